"""The edge of the simulated world: routes, their counters, and the order of requests that no engine takes yet.

A request goes to the least busy engine of its model. An engine takes ``Times.concurrency`` at a time; if all are full,
the request waits here, in the order of the gateway's own edge (``gateway_plugin.edge``): it counts as having come later
by a turn and a half for each other request that its user has at this model, and at most by ``LATEST_S``. A turn is the
time in which each of those who wait is served once: the mean of what those who waited took, divided by what their user
had at the model.

As in the gateway the counters are read once a second, those of draining routes every 50 ms, and a command takes 20 ms.
Two savings that change no decision: a draining route's counters are reported when they reach zero, and while nothing
waits or is in flight the counters are read every ten seconds.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping

from serve.core import events as ev
from serve.simulate.clock import Clock
from serve.simulate.metrics import Outcome
from serve.simulate.parts import Engine, Pending

EDGE_S = 0.02
"""From a command for a route until the edge has confirmed it."""
COUNTERS_S = 1.0
CLOSELY_S = 0.05
RESTING_S = 10.0
FIRST_S = 2.0
"""What a request is taken to last before one was measured."""
AHEAD = 1.5
LATEST_S = 300.0


class Edge:
    """Which engine serves which request. ``engines`` and ``pending`` belong to the world: all engines that live, and
    all requests without an outcome."""

    def __init__(
        self,
        clock: Clock,
        engines: Mapping[str, Engine],
        pending: Mapping[int, Pending],
        tell: Callable[[ev.Event], None],
        begins: Callable[[Pending], None],
        ends: Callable[[int, Outcome], None],
        turned_away: Callable[[int], None],
        counters_s: float = COUNTERS_S,
    ) -> None:
        """``turned_away``: a request that waited here has lost the last route of its model. ``counters_s``: between two
        readings of the counters."""
        self.clock, self.engines, self.pending = clock, engines, pending
        self.routes: dict[str, list[Engine]] = {}
        self.queues: dict[str, list[tuple[float, int]]] = {}
        """Model -> the requests that wait here, a heap: (as if come at, request)."""
        self._at_model: Counter[tuple[str, str]] = Counter()
        """Model, user -> requests that wait here or are in flight."""
        self._turn_s: dict[str, float] = {}
        self._tell = tell
        self._begins, self._ends, self._turned_away = begins, ends, turned_away
        self._read_at, self._counters_s = 0.0, counters_s

    # --- requests ---
    def take(self, number: int) -> bool:
        """Send a request to an engine of its model, or let it wait for one; False: it has no route."""
        one = self.pending[number]
        servers = self.routes.get(one.request.model)
        if not servers:
            return False
        self._at_model[mine := (one.request.model, one.request.user)] += 1
        engine = servers[0] if len(servers) == 1 else min(servers, key=lambda it: (len(it.service), it.id))
        if len(engine.service) < engine.times.concurrency:
            self._begin(number, engine)
        else:
            one.queued_at, one.turns = self.clock.now, self._at_model[mine]
            turn_s = self._turn_s.setdefault(engine.model, FIRST_S / engine.times.concurrency)
            later_s = min(LATEST_S, (one.turns - 1) * turn_s * AHEAD)
            heapq.heappush(self.queues.setdefault(engine.model, []), (self.clock.now + later_s, number))
        return True

    def _leaves(self, number: int, model: str) -> Pending:
        one = self.pending[number]
        self._at_model[model, one.request.user] -= 1
        return one

    def _measure(self, one: Pending, engine: Engine) -> None:
        """A mean over twice as many as there are at the model."""
        there = len(engine.service) + len(self.queues.get(engine.model, ()))
        took_s = (self.clock.now - one.queued_at) / one.turns
        self._turn_s[engine.model] += (took_s - self._turn_s[engine.model]) / (2 * there + 2)

    def _begin(self, number: int, engine: Engine) -> None:
        assert engine.open, f"{engine.id}: a request is sent to it without a route"
        assert engine.state == "ready", f"{engine.id}: a request is sent to it while it is {engine.state}"
        now, one = self.clock.now, self.pending[number]
        one.began = engine.last_used = now
        self._begins(one)
        request = one.request
        engine.service.begin(number, engine.times.alone_s(request.prompt_tokens, request.output_tokens), now)
        self._plan_end(engine)

    def _plan_end(self, engine: Engine) -> None:
        engine.due += 1
        end = engine.service.next_end()
        if end is not None:
            due = engine.due
            self.clock.at(end, lambda: self._served(engine, due))

    def _served(self, engine: Engine, due: int) -> None:
        if due != engine.due:
            return
        number = engine.service.end(self.clock.now)
        one = self._leaves(number, engine.model)
        if one.turns:
            self._measure(one, engine)
        self._plan_end(engine)
        if engine.open:
            self._fill(engine)
        self._ends(number, Outcome.SERVED)
        if engine.draining and not engine.service:
            self._count_soon(engine)

    def _fill(self, engine: Engine) -> None:
        queue = self.queues.get(engine.model)
        while queue and len(engine.service) < engine.times.concurrency:
            self._begin(heapq.heappop(queue)[1], engine)

    # --- commands for routes ---
    def open(self, engine_id: str) -> None:
        engine = self.engines.get(engine_id)
        state = engine.state if engine is not None else "gone"
        assert state in ("ready", "draining"), f"{engine_id}: its route is to be opened while it is {state}"
        self.clock.after(EDGE_S, lambda: self._opened(engine_id))

    def _opened(self, engine_id: str) -> None:
        engine = self.engines.get(engine_id)
        if engine is None or engine.state not in ("ready", "draining"):
            return
        engine.draining = False
        engine.becomes("ready")
        if not engine.open:
            engine.open = True
            self.routes.setdefault(engine.model, []).append(engine)
            self._fill(engine)
        self._tell(ev.RouteOpened(engine_id))

    def drain(self, engine_id: str) -> None:
        engine = self.engines.get(engine_id)
        if engine is not None:
            self.shut(engine)
            engine.draining = True
            if engine.state == "ready":
                engine.becomes("draining")
        self.clock.after(EDGE_S, lambda: self._drained(engine_id))

    def _drained(self, engine_id: str) -> None:
        self._tell(ev.RouteDrained(engine_id))
        engine = self.engines.get(engine_id)
        if engine is not None and not engine.service:
            self._count_soon(engine)

    def close(self, engine_id: str) -> None:
        if engine_id in self.engines:
            self.shut(self.engines[engine_id])
        self.clock.after(EDGE_S, lambda: self._tell(ev.RouteClosed(engine_id)))

    def shut(self, engine: Engine) -> None:
        """No new request goes to it; those that wait for its model and have no other route are turned away."""
        engine.draining = False
        if not engine.open:
            return
        engine.open = False
        left = self.routes[engine.model]
        left.remove(engine)
        if not left:
            for _, number in sorted(self.queues.pop(engine.model, ())):
                self._leaves(number, engine.model).turns = 0
                self._turned_away(number)

    def cut(self, engine: Engine) -> None:
        """It ends: so does what is in flight."""
        self.shut(engine)
        engine.due += 1
        for number in engine.service.cut():
            self._leaves(number, engine.model)
            self._ends(number, Outcome.CUT)

    # --- counters ---
    def watch(self) -> None:
        """Something came: the next reading is at most a second away."""
        if self._read_at > self.clock.now + self._counters_s:
            self.read_in(self._counters_s)

    def read_in(self, delay_s: float) -> None:
        """Schedule the next reading; one planned for later is void."""
        at = self._read_at = self.clock.now + delay_s
        self.clock.at(at, lambda: self._read() if at == self._read_at else None)

    def _read(self) -> None:
        self.read_in(self._counters_s if self.pending else RESTING_S)
        self._count([engine for engine in self.engines.values() if engine.open or engine.draining])

    def _count_soon(self, engine: Engine) -> None:
        self.clock.after(CLOSELY_S, lambda: self._count([engine]) if engine.draining else None)

    def _count(self, engines: list[Engine]) -> None:
        seen = tuple(
            ev.ServerSeen(one.id, one.open, len(one.service), one.last_used, self._queued(one)) for one in engines
        )
        self._tell(ev.EdgeSeen(seen, self.clock.now))

    def _queued(self, engine: Engine) -> int:
        """Its share of those that wait for its model."""
        queue = self.queues.get(engine.model)
        if not queue or not engine.open:
            return 0
        servers = self.routes[engine.model]
        each, more = divmod(len(queue), len(servers))
        return each + (servers.index(engine) < more)
