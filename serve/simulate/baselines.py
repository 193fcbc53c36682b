"""Policies of other systems, as rules of ``serve.simulate.house``; each names its source.

``POLICIES`` has them all by name, with the gateway's own controller.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from serve.core import events as ev
from serve.core.step import LRU
from serve.simulate.clairvoyant import Clairvoyant
from serve.simulate.deciders import Core
from serve.simulate.house import House, Rule, Seat
from serve.simulate.parts import Decider
from serve.simulate.traces import Trace


class Oldest(Rule):
    """The common part: the model with the oldest waiter is first, nothing is learned, nothing is unloaded."""

    summed = False

    def order(self, house: House, now: float) -> Sequence[str]:
        return sorted(house.waiting, key=lambda model: (house.waiting[model].oldest, model))

    def worth(self, house: House, seat: Seat, asking: str, now: float) -> float | None:
        return seat.last_used

    def may_switch(self, house: House, asking: str, victims: Sequence[Seat], worth: float, now: float) -> bool:
        return True

    def unload(self, house: House, seat: Seat, now: float) -> bool:
        return False


class Fifo(Oldest):
    """llama-swap (github.com/mostlygeek/llama-swap): a request for a model that is not loaded swaps at once; requests
    in flight are awaited; all that queue for one model are served by one load. It has one place; of several the least
    recently used one is evicted here, which is better than the one first loaded."""


class LruIgnoringFlight(Oldest):
    """Ray Serve's model multiplexing (``serve.multiplexed``, ``_ModelMultiplexWrapper.unload_model_lru``): the model
    whose last request began longest ago is evicted, even with requests in flight. (Here it is drained first, or
    requests would be lost.)"""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}

    def saw(self, house: House, event: ev.Event, now: float) -> None:
        if isinstance(event, ev.EdgeSeen):
            self._began.update((seen.engine, seen.last_used) for seen in event.servers)

    def worth(self, house: House, seat: Seat, asking: str, now: float) -> float | None:
        return max(seat.ready_at, self._began.get(seat.id, 0.0))


class LruWithPriority(Oldest):
    """The prototype that this project began with: of idle engines the one of the lowest priority is evicted, of equals
    the least recently used; never one of higher priority than the requested model. Priorities are the trace's."""

    def __init__(self, priorities: Mapping[str, int]) -> None:
        self._priorities = priorities

    def order(self, house: House, now: float) -> Sequence[str]:
        first = self._priorities
        return sorted(house.waiting, key=lambda model: (-first.get(model, 0), house.waiting[model].oldest, model))

    def worth(self, house: House, seat: Seat, asking: str, now: float) -> float | None:
        mine = self._priorities.get(seat.model, 0)
        if seat.in_flight or now < seat.ready_at + 2.0 or mine > self._priorities.get(asking, 0):
            return None
        return mine * 1e9 + seat.last_used


class KeepAlive(Oldest):
    """Ollama's ``OLLAMA_KEEP_ALIVE`` (5 minutes) and ServerlessLLM's ``keep_alive`` without its migration: an engine
    unused for this time is unloaded, and none is unloaded sooner for another model."""

    def __init__(self, keep_alive_s: float = 300.0) -> None:
        self.keep_alive_s = keep_alive_s

    def worth(self, house: House, seat: Seat, asking: str, now: float) -> float | None:
        return None

    def unload(self, house: House, seat: Seat, now: float) -> bool:
        return seat.in_flight == 0 and now >= seat.last_used + self.keep_alive_s


class Static(Oldest):
    """A static partition: the models with the most requests of the whole trace, as many as fit, have their GPUs for
    ever; the others have none. This is a site without switching that knows the demand beforehand."""

    def __init__(self, demand: Mapping[str, int]) -> None:
        self._demand = demand
        self._chosen: set[str] | None = None

    def order(self, house: House, now: float) -> Sequence[str]:
        if self._chosen is None:
            self._chosen = _that_fit(house, sorted(house.models, key=lambda m: (-self._demand.get(m, 0), m)))
        return [model for model in super().order(house, now) if model in self._chosen]

    def worth(self, house: House, seat: Seat, asking: str, now: float) -> float | None:
        return None


def _that_fit(house: House, models: Sequence[str]) -> set[str]:
    free = {node: list(mib) for node, mib in house.nodes.items()}
    chosen = set()
    for name in models:
        model = house.models[name]
        for mib in free.values():
            fit = sorted((left, gpu) for gpu, left in enumerate(mib) if left >= model.memory_mib)[: model.gpus]
            if len(fit) == model.gpus:
                for _, gpu in fit:
                    mib[gpu] -= model.memory_mib
                chosen.add(name)
                break
    return chosen


class CostAware(Oldest):
    """llmux's ``CostAwarePolicy`` (github.com/doublewordai/llmux, src/policy/cost_aware.rs), its five checks in order:
    (1) the oldest waiter has waited ``max_wait_s``: switch; (2) free devices: does not arise here; (3) the victim has
    served for less than the switch costs: not yet; (4) at least half as many wait as the switch has seconds: switch;
    (5) wait for more for ``window_s``. Costs are moving averages, 10 s before the first, 60 s at most."""

    def __init__(self, serving_window: bool = True) -> None:
        self.serving_window = serving_window
        self.max_wait_s, self.window_s, self.factor = 15.0, 2.0, 0.5
        self._cost: dict[str, float] = {}

    def saw(self, house: House, event: ev.Event, now: float) -> None:
        if isinstance(event, ev.EngineReady):
            model, took = house.seats[event.engine].model, min(60.0, event.load_s)
            self._cost[model] = 0.3 * took + 0.7 * self._cost.get(model, took)

    def may_switch(self, house: House, asking: str, victims: Sequence[Seat], worth: float, now: float) -> bool:
        waits, cost = house.waiting[asking], self._cost.get(asking, 10.0)
        if now - waits.oldest >= self.max_wait_s:  # (1)
            return True
        if self.serving_window and any(now - seat.ready_at < cost for seat in victims):  # (3)
            return False
        enough = len(waits.tickets) >= max(1, math.ceil(self.factor * cost))
        return enough or now - waits.oldest >= self.window_s  # (4), (5)


class Lru(Oldest):
    """Least recently used of the idle engines, in the baselines' loop: a check of that loop against the core."""

    def worth(self, house: House, seat: Seat, asking: str, now: float) -> float | None:
        return None if seat.in_flight or now < seat.ready_at + 2.0 else seat.last_used


def _clairvoyant(trace: Trace, *, bounded: bool) -> Decider | None:
    """``None`` where closed loops make the times of requests depend on the policy."""
    if trace.sessions:
        return None
    arrivals: defaultdict[str, list[float]] = defaultdict(list)
    for request in trace.arrivals:
        arrivals[request.model].append(request.at)
    return House(Clairvoyant(arrivals, bounded))


POLICIES: Mapping[str, Callable[[Trace], Decider | None]] = {
    "gateway": lambda trace: Core(),
    "lru-core": lambda trace: Core(policies=LRU),
    "fifo": lambda trace: House(Fifo()),
    "llmux": lambda trace: House(CostAware()),
    "lru": lambda trace: House(Lru()),
    "lru-multiplex": lambda trace: House(LruIgnoringFlight()),
    "lru-priority": lambda trace: House(LruWithPriority(trace.priorities)),
    "keep-alive": lambda trace: House(KeepAlive()),
    "static": lambda trace: House(Static(trace.demand())),
    "clairvoyant": lambda trace: _clairvoyant(trace, bounded=False),
    "clairvoyant-bound": lambda trace: _clairvoyant(trace, bounded=True),
}
"""A fresh decider for each run; ``None``: the policy does not apply to this trace."""
