"""Virtual time: clients, and what joins them to the edge, the agents and the decider. Any decider gets the events and
gives the effects of the gateway's controller (``serve.core``), so that all policies share one world and one accounting.

As in the gateway: a request whose model has an open route goes to an engine without an event for the decider
(``serve.simulate.edge``); a drained engine finishes its requests; a released waiter passes the edge again and comes
back if the route has closed meanwhile; engines do one thing at a time on their GPUs (``serve.simulate.agents``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from serve.core import effects as ef
from serve.core import events as ev
from serve.simulate.agents import Agents
from serve.simulate.clock import Clock
from serve.simulate.edge import COUNTERS_S, Edge
from serve.simulate.jobs import Batch, Nodes
from serve.simulate.metrics import Outcome, Tally
from serve.simulate.parts import Decider, Fleet, Loop, Pending
from serve.simulate.times import catalog
from serve.simulate.traces import Request, Trace

INNER_S = 0.005
"""From a waiter's answer until its request is at the edge again; from there to the cold path."""
TICK_S = 0.5
"""While something waits: the longest time between events after which the decider reviews everything. The gateway's
controller ticks every 0.25 s in any case: on a day of 37 models nearly twice as long a run for the same figures."""
TICK_LATEST_S = 1.0
"""Deadlines are checked at ticks only."""
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
    batch: Batch | None = None
    """Nodes come and go as the decider asks; ``None``: those of ``fleet`` are there."""
    until_s: float = math.inf
    """Ends then at the latest."""
    counters_s: float = COUNTERS_S
    """Between two readings of the edge's counters."""
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.pending: dict[int, Pending] = {}
        self.waiting: dict[str, int] = {}
        """Ticket -> request."""
        self.agents = Agents(self.clock, self.fleet, self.tally, self.tell, keep_spans=self.keep_spans)
        self.engines = self.agents.engines
        self.edge = Edge(
            self.clock, self.engines, self.pending,
            tell=self.tell, begins=self._waited, ends=self._ends,
            turned_away=lambda number: self.clock.after(INNER_S, lambda: self._waits(number)),
            counters_s=self.counters_s,
        )  # fmt: skip
        self.nodes = None if self.batch is None else Nodes(self.batch, self.clock, self.agents, self.tell)
        self._came = 0
        self._tickets = 0
        self._loops = [Loop(session) for session in self.trace.sessions]
        self._exhausted = False
        self._last_arrival = 0.0
        self._ticking = False
        self._ticked = self._reviewed = 0.0

    def run(self) -> Tally:
        """Run until every request has its outcome or none can have one any more."""
        nodes = self.fleet.nodes()
        self.tell(ev.CatalogChanged(catalog(self.trace.times, **self.entry)))
        self.tell(ev.Started(1, {}, (), tuple(nodes)))
        for node, mib in nodes.items():
            asleep = self.agents.sleep_mib
            self.tell(ev.NodeJoined(node, "gpu", f"block-{node}", "10.0.0.1", 0, mib, sleep_mib=asleep))
        for number, loop in enumerate(self._loops):
            self.clock.at(loop.session.starts, lambda number=number: self._next_batch(number))  # type: ignore[misc]
        self._next_arrival(iter(self.trace.arrivals))
        self.edge.read_in(0.0)
        while not self._over() and self.clock.advance(self.until_s):
            pass
        self._finish()
        return self.tally

    def _over(self) -> bool:
        if self.until_s < math.inf:  # what nodes cost after the last request counts
            return False
        if not self._exhausted or any(loop.open or loop.next < len(loop.session.batches) for loop in self._loops):
            return False
        hopeless = self.clock.now > self._last_arrival + 2 * self.patience_s and len(self.waiting) == len(self.pending)
        return not self.pending or hopeless

    def _finish(self) -> None:
        now = self.clock.now
        for one in self.pending.values():
            if one.began is None:
                self._waited(one)
            self.tally.ends(one.request.user, Outcome.LEFT, 0.0, now)
        self.agents.end()
        self.tally.end_s = now
        self.tally.gpu_s = now * self.fleet.gpus

    # --- clients ---
    def _next_arrival(self, arrivals: Iterator[Request]) -> None:
        request = next(arrivals, None)
        if request is None:
            self._exhausted = True
            return

        def come() -> None:
            self._next_arrival(arrivals)
            self._arrive(request, None)

        self.clock.at(request.at, come)

    def _next_batch(self, number: int) -> None:
        loop = self._loops[number]
        if loop.next == len(loop.session.batches):
            return
        batch = loop.session.batches[loop.next]
        loop.next += 1
        loop.open = len(batch)
        for request in batch:
            self.clock.after(request.at, lambda request=request: self._arrive(request, number))  # type: ignore[misc]

    def _arrive(self, request: Request, loop: int | None) -> None:
        self._came += 1
        now = self._last_arrival = self.clock.now
        if self.progress is not None and self._came % 256 == 0:
            self.progress(now, self._came)
        self.pending[self._came] = Pending(request, now, loop)
        self.edge.watch()
        self.tally.arrives(request.user, now)
        if not self.edge.take(self._came):
            self._waits(self._came)

    def _waits(self, number: int) -> None:
        """The cold path: the decider hears of it."""
        self._tickets += 1
        ticket = f"t{self._tickets}"
        self.waiting[ticket] = number
        self._acquire(ticket, again=False)

    def _acquire(self, ticket: str, again: bool) -> None:
        one = self.pending[self.waiting[ticket]]
        left_s = max(0.0, one.came + self.patience_s - self.clock.now)
        requester = ev.Requester(key=one.request.user)
        self.tell(ev.Acquire(ticket, one.request.model, left_s, not_routed=again, requester=requester))

    def _waited(self, one: Pending) -> None:
        self.tally.waited(self.clock.now - one.came, self.trace.times[one.request.model].bound_s)

    def _ends(self, number: int, outcome: Outcome) -> None:
        one, now = self.pending.pop(number), self.clock.now
        if one.began is None:
            self._waited(one)
        request = one.request
        alone_s = self.trace.times[request.model].alone_s(request.prompt_tokens, request.output_tokens)
        self.tally.ends(request.user, outcome, alone_s, now)
        if one.loop is not None:
            loop = self._loops[one.loop]
            loop.open -= 1
            if loop.open == 0:
                number = one.loop
                self.clock.after(loop.session.think_s, lambda: self._next_batch(number))

    # --- the decider and its commands ---
    def tell(self, event: ev.Event) -> None:
        """Pass an event to the decider, and carry out its effects."""
        if type(event) is not ev.Acquire:
            self._reviewed = self.clock.now
        for effect in self.decider.tell(event, self.clock.now):
            self._carry_out(effect)
        if (self.waiting or (self.nodes is not None and self.nodes.pending)) and not self._ticking:
            self._ticking = True
            self._ticked = self.clock.now
            self.clock.after(self.tick_s, self._tick)

    def _tick(self) -> None:
        due = min(self._reviewed + self.tick_s, self._ticked + TICK_LATEST_S)
        if due > self.clock.now + 1e-9:
            self.clock.at(due, self._tick)
        else:
            self._ticking = False
            self.tell(ev.Tick())

    def _carry_out(self, effect: ef.Effect) -> None:
        match effect:
            case ef.Answer(ticket, error):
                self._answer(ticket, error is not None)
            case ef.StartEngine():
                self.agents.start(effect, self.trace.times[effect.model.name])
            case ef.SleepEngine(engine):
                self.agents.sleep(self.engines[engine])
            case ef.WakeEngine(engine):
                self.agents.wake(self.engines[engine])
            case ef.StopEngine(engine):
                self._stop(engine)
            case ef.OpenRoute(engine):
                self.edge.open(engine)
            case ef.DrainRoute(engine):
                self.edge.drain(engine)
            case ef.CloseRoute(engine):
                self.edge.close(engine)
            case ef.CreateAgent(node):
                self._changing.ask_for(node)
            case ef.KillAgent(node):
                self._changing.give_back(node)

    @property
    def _changing(self) -> Nodes:
        assert self.nodes is not None, "this world's fleet does not change"
        return self.nodes

    def _answer(self, ticket: str, refused: bool) -> None:
        number = self.waiting[ticket]
        if refused:
            del self.waiting[ticket]
            self._ends(number, Outcome.REFUSED)
        else:
            self.clock.after(INNER_S, lambda: self._go(ticket))

    def _go(self, ticket: str) -> None:
        if self.edge.take(self.waiting[ticket]):
            del self.waiting[ticket]
        else:  # the route closed meanwhile
            self._acquire(ticket, again=True)

    def _stop(self, engine_id: str) -> None:
        engine = self.engines.get(engine_id)
        if engine is not None and engine.state != "stopping":
            self.edge.cut(engine)
            self.agents.stop(engine)
