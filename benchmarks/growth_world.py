"""The world of the growth simulation: jobs in a queue, nodes, engines, requests, in simulated time.

The controller is the real one, ``serve.core.step``, whatever the rule: which model goes where, eviction, keep-alive,
drains and answers are the same for all. Only ``Policies.scaling`` (how many nodes to ask for, which to release) is
another. Blocks end when they are released; walltimes are left out, for every rule.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.growth_trace import LOAD_S, NODE, Queue, Request, catalog
from serve.core import effects as ef
from serve.core import events as ev
from serve.core.policy import Policy
from serve.core.room import need_of
from serve.core.state import NodePhase
from serve.core.step import DEFAULT, initial, step
from serve.core.transaction import Transaction

Rule = Callable[[Transaction, tuple[str, ...]], None]
"""``serve.core.transaction.Policies.scaling``: (transaction, wanted models without room)."""

BOOT_S = 15.0
"""From a job's start until its agent is there."""
LEAVE_S = 12.0
"""From giving a node back until its job has ended; both measured on a real Slurm."""
STOP_S = 2.0
EDGE_S = 0.05
SLOW_S = 60.0
WAIT_S = 1800.0
"""How long a request waits before it is refused: ``Limits.wait_s``."""
COUNTERS_EVERY_S = 5.0
"""The edge is read every second in truth; five times as seldom is as good for growth and five times as fast."""
TICK_S = 1.0
"""While somebody waits or a job is pending."""


@dataclass
class Job:
    """One job: submitted, started (or never), ended (or not yet)."""

    submitted: float
    started: float | None = None
    ended: float | None = None


@dataclass
class Tally:
    """What a run came to."""

    jobs: dict[str, Job] = field(default_factory=dict)
    waited_s: list[float] = field(default_factory=list)
    """Of every request that was let through to an engine."""
    refused_s: list[float] = field(default_factory=list)
    """How long those waited that were refused."""
    still_waiting_s: list[float] = field(default_factory=list)
    """At the end of the day."""
    pending_max: int = 0
    over_submission: int = 0
    """Largest number of jobs in the queue beyond those that models without room needed, just after a submission."""
    nodes_over_time: list[tuple[float, int, int]] = field(default_factory=list)
    """(time, running, pending) at every change."""
    end_s: float = 0.0

    @property
    def node_hours(self) -> float:
        """Sum of every job's time from its start to its end; only that is paid."""
        ends = ((job.started, self.end_s if job.ended is None else job.ended) for job in self.jobs.values())
        return sum(min(end, self.end_s) - start for start, end in ends if start is not None) / 3600

    @property
    def requests(self) -> int:
        return len(self.waited_s) + len(self.refused_s) + len(self.still_waiting_s)

    @property
    def waited_over_60s(self) -> float:
        """Share of all requests that waited longer than ``SLOW_S``, refused and still waiting ones among them."""
        waits = (*self.waited_s, *self.refused_s, *self.still_waiting_s)
        return sum(wait > SLOW_S for wait in waits) / max(1, len(waits))

    def document(self) -> dict[str, float | int]:
        """As ``build/bench/growth.json`` has it."""
        return {
            "node_hours": round(self.node_hours, 2),
            "waited_over_60s": round(self.waited_over_60s, 4),
            "jobs_submitted": len(self.jobs),
            "max_over_submission": self.over_submission,
        }


def nodes_needed(gpus: Sequence[int]) -> int:
    """How many empty nodes hold models with so many GPUs each: first fit, the largest first."""
    free: list[int] = []
    for need in sorted(gpus, reverse=True):
        place = next((index for index, left in enumerate(free) if left >= need), None)
        if place is None:
            free.append(len(NODE.gpu_mib) - need)
        else:
            free[place] -= need
    return len(free)


class World:
    """One run over one trace."""

    def __init__(self, trace: Sequence[Request], queue: Queue, policy: Policy, rule: Rule | None, end_s: float) -> None:
        self.models = {model.name: model for model in catalog()}
        self.trace, self.queue, self.end_s = trace, queue, end_s
        self.policies = DEFAULT if rule is None else replace(DEFAULT, scaling=rule)
        self.now = 0.0
        self.tally = Tally(end_s=end_s)
        self.fleet = initial(policy)
        self.agents: dict[str, str] = {}
        """Node -> ``pending``, ``booting`` or ``up``."""
        self.engines: dict[str, tuple[str, str]] = {}
        """Engine -> its model and node: processes that exist."""
        self.open: dict[str, str] = {}
        """Model -> engine with an open route."""
        self.in_flight: dict[str, int] = {}
        self.last_used: dict[str, float] = {}
        self.waiting: dict[str, Request] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._ticking = False

    def run(self) -> Tally:
        """The whole day; then who still waits is counted."""
        self.tell(ev.CatalogChanged(tuple(self.models.values())))
        self.tell(ev.Started(1, {}, (), ()))
        self.after(0.0, self._read_counters)
        arrivals = iter(enumerate(self.trace))
        self._next_arrival(arrivals)
        while self._events and self._events[0][0] <= self.end_s:
            self.now, _, act = heapq.heappop(self._events)
            act()
        self.tally.still_waiting_s = [self.end_s - request.at for request in self.waiting.values()]
        return self.tally

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay_s, next(self._order), act))

    # --- requests ---
    def _next_arrival(self, arrivals: Iterator[tuple[int, Request]]) -> None:
        for index, request in arrivals:

            def come(index: int = index, request: Request = request) -> None:
                self._next_arrival(arrivals)
                self._arrive(f"t{index}", request)

            heapq.heappush(self._events, (request.at, next(self._order), come))
            return

    def _arrive(self, ticket: str, request: Request) -> None:
        if request.model in self.open:  # the warm path: the controller does not see it
            self._serve(request)
        else:
            self.waiting[ticket] = request
            self._acquire(ticket, request)

    def _acquire(self, ticket: str, request: Request, again: bool = False) -> None:
        left_s = max(0.0, request.at + WAIT_S - self.now)
        self.tell(ev.Acquire(ticket, request.model, left_s, not_routed=again))

    def _serve(self, request: Request) -> None:
        engine = self.open[request.model]
        self.tally.waited_s.append(self.now - request.at)
        self.in_flight[engine] = self.in_flight.get(engine, 0) + 1
        self.last_used[engine] = self.now
        self.after(request.work_s, lambda: self._finish(engine))

    def _finish(self, engine: str) -> None:
        self.in_flight[engine] -= 1
        self.last_used[engine] = self.now
        if self.in_flight[engine] == 0 and engine in self.fleet.engines and self.fleet.engines[engine].drained:
            self._count((engine,))

    # --- the controller and its commands ---
    def tell(self, event: ev.Event) -> None:
        self.fleet, effects = step(self.fleet, event, self.now, self.policies)
        submitted = False
        for effect in effects:
            submitted = submitted or isinstance(effect, ef.CreateAgent)
            self._carry_out(effect)
        if submitted:
            self._note_submission()
        if not self._ticking and (self.fleet.queues or "pending" in self.agents.values()):
            self._ticking = True
            self.after(TICK_S, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        self.tell(ev.Tick())

    def _carry_out(self, effect: ef.Effect) -> None:
        match effect:
            case ef.Answer(ticket, error):
                self._answer(ticket, error is not None)
            case ef.StartEngine(engine, node, model):
                self.engines[engine] = (model.name, node)
                self.after(LOAD_S[model.gpus], lambda: self._ready(engine, LOAD_S[model.gpus]))
            case ef.StopEngine(engine):
                self.after(STOP_S, lambda: self._stopped(engine))
            case ef.OpenRoute(engine):
                self.after(EDGE_S, lambda: self._opened(engine))
            case ef.DrainRoute(engine):
                self.open = {model: one for model, one in self.open.items() if one != engine}
                self.after(EDGE_S, lambda: self._drained(engine))
            case ef.CloseRoute(engine):
                self.open = {model: one for model, one in self.open.items() if one != engine}
                self.after(EDGE_S, lambda: self.tell(ev.RouteClosed(engine)))
            case ef.CreateAgent(node):
                self.agents[node] = "pending"
                self.tally.jobs[node] = Job(self.now)
                self.after(self.queue.wait_s(), lambda: self._job_starts(node))
                self._note_nodes()
            case ef.KillAgent(node):
                self._job_ends(node)

    def _answer(self, ticket: str, refused: bool) -> None:
        request = self.waiting[ticket]
        if refused:
            del self.waiting[ticket]
            self.tally.refused_s.append(self.now - request.at)
        elif request.model in self.open:
            del self.waiting[ticket]
            self._serve(request)
        else:  # told to go just as its route closed: it comes back
            self.after(EDGE_S, lambda: self._acquire(ticket, request, again=True))

    # --- engines and routes ---
    def _ready(self, engine: str, load_s: float) -> None:
        if engine in self.engines:
            self.tell(ev.EngineReady(engine, f"{engine}:1", load_s))

    def _stopped(self, engine: str) -> None:
        if engine in self.engines:
            del self.engines[engine]
            self.tell(ev.EngineExited(engine, "stopped", True))

    def _opened(self, engine: str) -> None:
        if engine in self.engines:
            self.open[self.engines[engine][0]] = engine
            self.tell(ev.RouteOpened(engine))

    def _drained(self, engine: str) -> None:
        self.tell(ev.RouteDrained(engine))
        self.after(EDGE_S, lambda: self._count((engine,)))

    def _read_counters(self) -> None:
        self._count(tuple(engine.id for engine in self.fleet.engines.values() if engine.server is not None))
        self.after(COUNTERS_EVERY_S, self._read_counters)

    def _count(self, engines: tuple[str, ...]) -> None:
        seen = tuple(
            ev.ServerSeen(one, one in self.engines, self.in_flight.get(one, 0), self.last_used.get(one, 0.0))
            for one in engines
        )
        self.tell(ev.EdgeSeen(seen, self.now))

    # --- jobs ---
    def _job_starts(self, node: str) -> None:
        if self.agents.get(node) == "pending":
            self.agents[node] = "booting"
            self.tally.jobs[node].started = self.now
            self.after(BOOT_S, lambda: self._joins(node))
            self._note_nodes()

    def _joins(self, node: str) -> None:
        if self.agents.get(node) == "booting":
            self.agents[node] = "up"
            self.tell(ev.NodeJoined(node, NODE.name, f"gw-{node}", "10.0.0.1", NODE.host_mib, NODE.gpu_mib))

    def _job_ends(self, node: str) -> None:
        """Given back. A job that never started costs nothing."""
        del self.agents[node]
        job = self.tally.jobs[node]
        job.ended = self.now if job.started is None else self.now + LEAVE_S
        assert not any(place == node for _, place in self.engines.values()), "a node was given back with engines on it"
        self._note_nodes()

    def _note_nodes(self) -> None:
        states = list(self.agents.values())
        pending = states.count("pending")
        self.tally.pending_max = max(self.tally.pending_max, pending)
        self.tally.nodes_over_time.append((self.now, len(states) - pending, pending))

    def _note_submission(self) -> None:
        """Wanted models without an engine need so many empty nodes at most; what pends beyond that is too much."""
        without = [
            need_of(self.models[model]).gpus for model in self.fleet.queues if not self.fleet.model_engines.get(model)
        ]
        pending = sum(node.phase is NodePhase.PENDING for node in self.fleet.nodes.values())
        self.tally.over_submission = max(self.tally.over_submission, pending - nodes_needed(without))
