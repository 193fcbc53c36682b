"""Virtual time: clients, the edge, agents with engines. Any decider gets the events and gives the effects of the
gateway's controller (``serve.core``), so that all policies share one world and one accounting.

As in the gateway: a request whose model has an open route goes to its least busy engine without an event for the
decider; counters are read once a second, of draining routes every 50 ms; a drained engine finishes its requests; a
released waiter passes the edge again and comes back if the route has closed meanwhile. Two savings that change no
decision: a draining route's counters are reported when they reach zero, and while nothing waits or is in flight the
counters are read every ten seconds.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from serve.core import effects as ef
from serve.core import events as ev
from serve.simulate.metrics import Outcome, Span, Tally
from serve.simulate.parts import Decider, Engine, Fleet, Loop, Pending
from serve.simulate.service import Service
from serve.simulate.times import catalog
from serve.simulate.traces import Request, Trace

EDGE_S = 0.02
"""From a command for a route until the edge has confirmed it."""
INNER_S = 0.005
"""From a waiter's answer until its request is at the edge again."""
COUNTERS_S = 1.0
CLOSELY_S = 0.05
RESTING_S = 10.0
TICK_S = 0.25
"""While something waits."""
PATIENCE_S = 1800.0
"""How long a request waits: ``Limits.wait_s``."""


@dataclass
class World:
    """One run of one decider over one trace."""

    trace: Trace
    fleet: Fleet
    decider: Decider
    patience_s: float = PATIENCE_S
    tick_s: float = TICK_S
    keep_spans: bool = True
    progress: Callable[[float, int], None] | None = None
    """Progress callback: the time of the trace, requests that came."""
    entry: Mapping[str, object] = field(default_factory=dict)
    """Further keys of every model's catalog entry, such as ``replicas_max``."""
    now: float = 0.0
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self.engines: dict[str, Engine] = {}
        self.routes: dict[str, list[Engine]] = {}
        self.pending: dict[int, Pending] = {}
        self.waiting: dict[str, int] = {}
        """Ticket -> request."""
        self._free = {node: list(mib) for node, mib in self.fleet.nodes().items()}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._came = 0
        self._loops = [Loop(session) for session in self.trace.sessions]
        self._exhausted = False
        self._last_arrival = 0.0
        self._ticking = False
        self._read_at = 0.0
        self._given_up: set[tuple[str, int, str]] = set()
        """GPUs that an engine left since something was last started there: node, index, model."""

    def run(self) -> Tally:
        """Run until every request has its outcome or none can have one any more."""
        self.tell(ev.CatalogChanged(catalog(self.trace.times, **self.entry)))
        self.tell(ev.Started(1, {}, (), tuple(self._free)))
        for node, mib in self.fleet.nodes().items():
            self.tell(ev.NodeJoined(node, "gpu", f"block-{node}", "10.0.0.1", 0, mib))
        for number, loop in enumerate(self._loops):
            self.after(loop.session.starts, lambda number=number: self._next_batch(number))  # type: ignore[misc]
        self._next_arrival(iter(self.trace.arrivals))
        self._read_in(0.0)
        while self._heap and not self._over():
            self.now, _, act = heapq.heappop(self._heap)
            act()
        self._finish()
        return self.tally

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay_s, next(self._order), act))

    def _over(self) -> bool:
        if not self._exhausted or any(loop.open or loop.next < len(loop.session.batches) for loop in self._loops):
            return False
        hopeless = self.now > self._last_arrival + 2 * self.patience_s and len(self.waiting) == len(self.pending)
        return not self.pending or hopeless

    def _finish(self) -> None:
        for one in self.pending.values():
            if one.began is None:
                self.tally.waits_s.append(self.now - one.came)
            self.tally.ends(one.request.user, Outcome.LEFT, 0.0, self.now)
        for engine in self.engines.values():
            self._becomes(engine, "")
        self.tally.end_s = self.now
        self.tally.gpu_s = self.now * self.fleet.gpus

    # --- clients ---
    def _next_arrival(self, arrivals: Iterator[Request]) -> None:
        request = next(arrivals, None)
        if request is None:
            self._exhausted = True
            return

        def come() -> None:
            self._next_arrival(arrivals)
            self._arrive(request, None)

        heapq.heappush(self._heap, (max(self.now, request.at), next(self._order), come))

    def _next_batch(self, number: int) -> None:
        loop = self._loops[number]
        if loop.next == len(loop.session.batches):
            return
        batch = loop.session.batches[loop.next]
        loop.next += 1
        loop.open = len(batch)
        for request in batch:
            self.after(request.at, lambda request=request: self._arrive(request, number))  # type: ignore[misc]

    def _arrive(self, request: Request, loop: int | None) -> None:
        self._came += 1
        if self.progress is not None and self._came % 256 == 0:
            self.progress(self.now, self._came)
        self._last_arrival = self.now
        number = self._came
        self.pending[number] = Pending(request, self.now, loop)
        if self._read_at > self.now + COUNTERS_S:
            self._read_in(COUNTERS_S)
        self.tally.arrives(request.user, self.now)
        if not self._route(number):
            self.waiting[f"t{number}"] = number
            self._acquire(f"t{number}", again=False)

    def _acquire(self, ticket: str, again: bool) -> None:
        one = self.pending[self.waiting[ticket]]
        left_s = max(0.0, one.came + self.patience_s - self.now)
        self.tell(ev.Acquire(ticket, one.request.model, left_s, not_routed=again))

    def _route(self, number: int) -> bool:
        """At the edge: to the least busy engine of its model, if there is one."""
        one = self.pending[number]
        servers = self.routes.get(one.request.model)
        if not servers:
            return False
        engine = min(servers, key=lambda server: (len(server.service), server.id))
        one.began = self.now
        self.tally.waits_s.append(self.now - one.came)
        engine.last_used = self.now
        engine.service.begin(number, self._alone_s(one.request), self.now)
        self._schedule(engine)
        return True

    def _alone_s(self, request: Request) -> float:
        return self.trace.times[request.model].alone_s(request.prompt_tokens, request.output_tokens)

    def _schedule(self, engine: Engine) -> None:
        engine.due += 1
        end = engine.service.next_end()
        if end is not None:
            due = engine.due
            heapq.heappush(self._heap, (end, next(self._order), lambda: self._served(engine, due)))

    def _served(self, engine: Engine, due: int) -> None:
        if due != engine.due:
            return
        number = engine.service.end(self.now)
        self._schedule(engine)
        self._ends(number, Outcome.SERVED)
        if engine.draining and not engine.service:
            self._count_soon(engine)

    def _ends(self, number: int, outcome: Outcome) -> None:
        one = self.pending.pop(number)
        if one.began is None:
            self.tally.waits_s.append(self.now - one.came)
        self.tally.ends(one.request.user, outcome, self._alone_s(one.request), self.now)
        if one.loop is not None:
            loop = self._loops[one.loop]
            loop.open -= 1
            if loop.open == 0:
                number = one.loop
                self.after(loop.session.think_s, lambda: self._next_batch(number))

    # --- the decider and its commands ---
    def tell(self, event: ev.Event) -> None:
        """Pass an event to the decider, and carry out its effects."""
        for effect in self.decider.tell(event, self.now):
            self._carry_out(effect)
        if self.waiting and not self._ticking:
            self._ticking = True
            self.after(self.tick_s, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        self.tell(ev.Tick())

    def _carry_out(self, effect: ef.Effect) -> None:
        match effect:
            case ef.Answer(ticket, error):
                self._answer(ticket, error is not None)
            case ef.StartEngine():
                self._start(effect)
            case ef.StopEngine(engine):
                self._stop(engine)
            case ef.OpenRoute(engine):
                self.after(EDGE_S, lambda: self._opened(engine))
            case ef.DrainRoute(engine):
                self._shut(engine, draining=True)
                self.after(EDGE_S, lambda: self._drained(engine))
            case ef.CloseRoute(engine):
                self._shut(engine, draining=False)
                self.after(EDGE_S, lambda: self.tell(ev.RouteClosed(engine)))
            case ef.CreateAgent(node) | ef.KillAgent(node):
                raise AssertionError(f"{node}: this world's fleet does not change")

    def _answer(self, ticket: str, refused: bool) -> None:
        number = self.waiting[ticket]
        if refused:
            del self.waiting[ticket]
            self._ends(number, Outcome.REFUSED)
        else:
            self.after(INNER_S, lambda: self._go(ticket))

    def _go(self, ticket: str) -> None:
        if self._route(self.waiting[ticket]):
            del self.waiting[ticket]
        else:  # the route closed meanwhile
            self._acquire(ticket, again=True)

    # --- agents and engines ---
    def _start(self, start: ef.StartEngine) -> None:
        model, free = start.model, self._free[start.node]
        for gpu in start.gpus:
            free[gpu] -= model.memory_mib
            assert free[gpu] >= 0, f"{start.engine}: the memory of {start.node}'s GPU {gpu} is over-committed"
        assert len(start.gpus) == model.gpus
        times = self.trace.times[model.name]
        engine = Engine(
            start.engine, model.name, start.node, start.gpus, model.memory_mib, times,
            Service(times.beside), since=self.now,
        )  # fmt: skip
        self.engines[engine.id] = engine
        self.tally.loads += 1
        left = {one for one in self._given_up if one[0] == start.node and one[1] in start.gpus}
        self._given_up -= left
        self.tally.switches += any(other != model.name for _, _, other in left)
        self.after(times.cold_s, lambda: self._ready(engine))

    def _becomes(self, engine: Engine, state: str) -> None:
        if engine.state == "loading":
            self.tally.device_s_lost += (self.now - engine.since) * len(engine.gpus)
        if self.keep_spans and self.now > engine.since:
            share = engine.mib / (self.fleet.gpu_gib * 1024)
            self.tally.spans.append(
                Span(engine.id, engine.node, engine.gpus, share, engine.model, engine.state, engine.since, self.now)
            )
        engine.state, engine.since = state, self.now

    def _ready(self, engine: Engine) -> None:
        if self.engines.get(engine.id) is engine and engine.state == "loading":
            self._becomes(engine, "ready")
            self.tell(ev.EngineReady(engine.id, f"{engine.id}:1", engine.times.cold_s))

    def _stop(self, engine_id: str) -> None:
        engine = self.engines.get(engine_id)
        if engine is None or engine.state == "stopping":
            return
        self._shut(engine_id, draining=False)
        self._becomes(engine, "stopping")
        engine.due += 1
        for number in engine.service.cut():
            self._ends(number, Outcome.CUT)
        self.after(engine.times.stop_s, lambda: self._stopped(engine))

    def _stopped(self, engine: Engine) -> None:
        self._becomes(engine, "")
        del self.engines[engine.id]
        for gpu in engine.gpus:
            self._free[engine.node][gpu] += engine.mib
            self._given_up.add((engine.node, gpu, engine.model))
        self.tell(ev.EngineExited(engine.id, "stopped", expected=True))

    # --- the edge ---
    def _opened(self, engine_id: str) -> None:
        engine = self.engines.get(engine_id)
        if engine is None or engine.state == "stopping":
            return
        if engine.state == "draining":
            self._becomes(engine, "ready")
        engine.draining = False
        if not engine.open:
            engine.open = True
            self.routes.setdefault(engine.model, []).append(engine)
        self.tell(ev.RouteOpened(engine_id))

    def _shut(self, engine_id: str, *, draining: bool) -> None:
        engine = self.engines.get(engine_id)
        if engine is None:
            return
        if engine.open:
            engine.open = False
            self.routes[engine.model].remove(engine)
        engine.draining = draining
        if draining and engine.state == "ready":
            self._becomes(engine, "draining")

    def _drained(self, engine_id: str) -> None:
        self.tell(ev.RouteDrained(engine_id))
        engine = self.engines.get(engine_id)
        if engine is not None and not engine.service:
            self._count_soon(engine)

    def _count_soon(self, engine: Engine) -> None:
        self.after(CLOSELY_S, lambda: self._count([engine]) if engine.draining else None)

    def _read_counters(self) -> None:
        self._read_in(COUNTERS_S if self.pending else RESTING_S)
        self._count([engine for engine in self.engines.values() if engine.open or engine.draining])

    def _read_in(self, delay_s: float) -> None:
        """Schedule the next reading; one planned for later is void."""
        at = self._read_at = self.now + delay_s
        self.after(delay_s, lambda: self._read_counters() if at == self._read_at else None)

    def _count(self, engines: list[Engine]) -> None:
        seen = tuple(ev.ServerSeen(engine.id, engine.open, len(engine.service), engine.last_used) for engine in engines)
        self.tell(ev.EdgeSeen(seen, self.now))
