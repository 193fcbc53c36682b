"""The agents of the simulated world and their engines: starts, stops, sleeps and wakes, on memory that is never
over-committed. The world stops with an ``AssertionError`` where a decider breaks what the gateway rules out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from serve.core import effects as ef
from serve.core import events as ev
from serve.simulate.clock import Clock
from serve.simulate.metrics import Span, Tally
from serve.simulate.parts import Engine, Fleet
from serve.simulate.service import Service
from serve.simulate.times import Times

LOST = frozenset({"loading", "falling-asleep", "waking"})
"""States that serve nothing and keep others off their devices."""


class Agents:
    """All engines that live, by id in ``engines``."""

    def __init__(
        self, clock: Clock, fleet: Fleet, tally: Tally, tell: Callable[[ev.Event], None], *, keep_spans: bool
    ) -> None:
        self.engines: dict[str, Engine] = {}
        self._clock, self._fleet, self._tally, self._tell = clock, fleet, tally, tell
        self._keep_spans = keep_spans
        self._free: dict[str, list[int]] = {}
        self.sleep_mib = round(fleet.host_gib * 1024)
        """Of each node, for the weights of engines that sleep or have slept."""
        self._free_asleep: dict[str, int] = {}
        self._held: dict[tuple[str, tuple[str, int]], int] = {}
        """Engine, GPU -> MiB."""
        self._busy: dict[tuple[str, int], list[Engine]] = {}
        """Engines that start, fall asleep, wake or stop, by GPU."""
        self._given_up: dict[tuple[str, int], set[str]] = {}
        """GPU -> models that left it since something last started or woke there."""

        for node, mib in fleet.nodes().items():
            self.joins(node, mib)

    # --- nodes ---
    def joins(self, node: str, gpu_mib: Sequence[int]) -> None:
        self._free[node] = list(gpu_mib)
        self._free_asleep[node] = self.sleep_mib

    def leaves(self, node: str) -> None:
        assert not any(engine.node == node for engine in self.engines.values()), f"{node}: given back with engines"
        del self._free[node], self._free_asleep[node]

    # --- commands ---
    def start(self, start: ef.StartEngine, times: Times) -> None:
        assert len(start.gpus) == start.model.gpus
        engine = Engine(
            start.engine, start.model.name, start.node, start.gpus, start.model.memory_mib, times,
            Service(times.beside), since=self._clock.now, seen=self._seen,
        )  # fmt: skip
        self._takes_its_gpus(engine)
        self._takes_host_memory(engine, start.sleep_mib)
        self.engines[engine.id] = engine
        self._tally.loads += 1
        load_s = times.cold_s
        if start.sleep_mib:  # it sleeps once before it is ready
            load_s += times.first_sleep_s(self._fleet.pin_gib_per_s) + times.wake_s
        self._clock.after(load_s, lambda: self._loaded(engine, load_s))

    def _loaded(self, engine: Engine, load_s: float) -> None:
        if engine.state != "loading":
            return
        if engine.sleep_mib:
            self._sleeps_first(engine)
        engine.becomes("ready")
        self._rests(engine)
        can_sleep = self.sleep_mib > 0
        told = ev.EngineReady(engine.id, f"{engine.id}:1", load_s, can_sleep=can_sleep, sleep_mib=engine.sleep_mib)
        self._tell(told)

    def _takes_host_memory(self, engine: Engine, mib: int) -> None:
        self._free_asleep[engine.node] -= mib - engine.sleep_mib
        engine.sleep_mib = mib
        free = self._free_asleep[engine.node]
        assert free >= 0, f"{engine.id}: {-free} MiB too much sleeps on {engine.node}"

    def _sleeps_first(self, engine: Engine) -> None:
        """What it takes is known from now on."""
        self._takes_host_memory(engine, round(engine.times.weights_gib * 1024))
        engine.slept = True

    def sleep(self, engine: Engine) -> None:
        """(1) Its first sleep takes host memory, and the time for that; (2) its GPUs are free when it sleeps."""
        assert engine.state in ("ready", "draining"), f"{engine.id}: put to sleep while it is {engine.state}"
        assert not engine.open, f"{engine.id}: put to sleep with an open route"
        assert not engine.service, f"{engine.id}: put to sleep with {len(engine.service)} requests in flight"
        self._moves(engine, LOST)
        took_s = engine.times.sleep_s
        if not engine.slept:  # (1)
            took_s = engine.times.first_sleep_s(self._fleet.pin_gib_per_s)
            self._sleeps_first(engine)
        engine.becomes("falling-asleep")

        def asleep() -> None:
            if engine.state == "falling-asleep":
                engine.becomes("asleep")
                self._rests(engine)
                kept_mib = round(engine.times.kept_gib * 1024)
                self._leaves_its_gpus(engine, kept_mib)  # (2)
                self._tell(ev.EngineAsleep(engine.id, engine.sleep_mib, took_s, kept_mib))

        self._tally.sleeps += 1
        self._clock.after(took_s, asleep)

    def wake(self, engine: Engine) -> None:
        assert engine.state == "asleep", f"{engine.id}: woken while it is {engine.state}"
        self._takes_its_gpus(engine)
        engine.becomes("waking")

        def awake() -> None:
            if engine.state == "waking":
                engine.becomes("ready")
                self._rests(engine)
                self._tell(ev.EngineAwake(engine.id, engine.times.wake_s))

        self._tally.wakes += 1
        self._clock.after(engine.times.wake_s, awake)

    def stop(self, engine: Engine) -> None:
        """Its route is closed and what was in flight is cut."""
        slept = engine.state == "asleep"
        self._rests(engine)
        self._moves(engine, frozenset() if slept else LOST)
        engine.becomes("stopping")

        def stopped() -> None:
            engine.becomes("")
            self._rests(engine)
            del self.engines[engine.id]
            self._leaves_its_gpus(engine)
            self._free_asleep[engine.node] += engine.sleep_mib
            self._tell(ev.EngineExited(engine.id, "stopped", expected=True))

        self._clock.after(engine.times.stop_s, stopped)

    def end(self) -> None:
        """The run ends: what every engine did until now counts."""
        for engine in self.engines.values():
            engine.becomes("")

    # --- devices ---
    def _takes_its_gpus(self, engine: Engine) -> None:
        """All of its memory there, with what it may have kept."""
        self._moves(engine)
        left: set[str] = set()
        for place in engine.places:
            self._hold(engine, place, engine.mib)
            left |= self._given_up.pop(place, set())
        self._tally.switches += bool(left - {engine.model})

    def _leaves_its_gpus(self, engine: Engine, kept_mib: int = 0) -> None:
        for place in engine.places:
            if self._held.get((engine.id, place)) == engine.mib:
                self._given_up.setdefault(place, set()).add(engine.model)
            self._hold(engine, place, kept_mib)

    def _hold(self, engine: Engine, place: tuple[str, int], mib: int) -> None:
        free = self._free[place[0]]
        free[place[1]] += self._held.pop((engine.id, place), 0) - mib
        if mib:
            self._held[engine.id, place] = mib
        assert free[place[1]] >= 0, f"{engine.id}: the memory of {place[0]}'s GPU {place[1]} is over-committed"

    def _moves(self, engine: Engine, against: frozenset[str] = LOST | {"stopping"}) -> None:
        """It changes its state on its GPUs, where no other one is in a state of ``against``: nothing else moves where
        memory is taken; memory may be given back while another process stops."""
        for place in engine.places:
            beside = self._busy.setdefault(place, [])
            other = next((one for one in beside if one.state in against), None)
            assert other is None, f"{engine.id}: moves on {place} while {other and other.id} is {other and other.state}"
            beside.append(engine)

    def _rests(self, engine: Engine) -> None:
        for place in engine.places:
            if engine in (beside := self._busy.get(place, [])):
                beside.remove(engine)

    def _seen(self, engine: Engine) -> None:
        """The time in a state counts when it ends."""
        now = self._clock.now
        if engine.state in LOST:
            self._tally.device_s_lost += (now - engine.since) * len(engine.gpus)
        if self._keep_spans and now > engine.since:
            share = self._held.get((engine.id, engine.places[0]), 0) / (self._fleet.gpu_gib * 1024)
            self._tally.spans.append(
                Span(engine.id, engine.node, engine.gpus, share, engine.model, engine.state, engine.since, now)
            )
        engine.since = now
