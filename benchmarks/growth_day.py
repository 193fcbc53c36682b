"""One rule's day: the simulated world of ``serve.simulate`` with a batch system, and what the day came to.

The controller is the real one, ``serve.core.step``, whatever the rule: which model goes where, eviction, keep-alive,
drains and answers are the same for all. Only ``Policies.scaling`` (how many nodes to ask for, which to release) is
another.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.growth_trace import KEEP_ALIVE_S, NODE, Queue, times
from serve.core import effects as ef
from serve.core import events as ev
from serve.core.policy import Policy
from serve.core.room import need_of
from serve.core.state import NodePhase
from serve.core.step import DEFAULT
from serve.core.transaction import Transaction
from serve.simulate.deciders import Core
from serve.simulate.jobs import Batch, Job
from serve.simulate.metrics import Outcome
from serve.simulate.parts import Fleet
from serve.simulate.traces import Request, Trace
from serve.simulate.world import World

Rule = Callable[[Transaction, tuple[str, ...]], None]
"""``serve.core.transaction.Policies.scaling``: (transaction, wanted models without room)."""

SLOW_S = 60.0
COUNTERS_EVERY_S = 5.0
"""The edge is read every second in truth; five times as seldom is as good for growth and five times as fast."""
TICK_S = 1.0


@dataclass(frozen=True)
class Day:
    """What a run came to."""

    jobs: dict[str, Job]
    waits_s: array[float]
    """Of every request: until it was let through to an engine, until it was refused, or until the end of the day."""
    refused: int
    over_submission: int
    """Largest number of jobs in the queue beyond those that models without room needed, just after a submission."""
    nodes_over_time: list[tuple[float, int, int]]
    """(time, running, pending) at every change."""
    node_hours: float
    end_s: float

    @property
    def waited_over_60s(self) -> float:
        """Share of all requests that waited longer than ``SLOW_S``, refused and still waiting ones among them."""
        return sum(wait > SLOW_S for wait in self.waits_s) / max(1, len(self.waits_s))

    def document(self) -> dict[str, float | int]:
        """As ``build/bench/growth.json`` has it."""
        return {
            "node_hours": round(self.node_hours, 2),
            "waited_over_60s": round(self.waited_over_60s, 4),
            "jobs_submitted": len(self.jobs),
            "max_over_submission": self.over_submission,
        }


class Counting(Core):
    """Counts at every submission what pends beyond what is needed."""

    def __init__(self, policy: Policy, rule: Rule | None) -> None:
        super().__init__(policy, DEFAULT if rule is None else replace(DEFAULT, scaling=rule))
        self.over_submission = 0

    def tell(self, event: ev.Event, now: float) -> tuple[ef.Effect, ...]:
        effects = super().tell(event, now)
        if any(isinstance(effect, ef.CreateAgent) for effect in effects):
            fleet = self.fleet
            without = [need_of(fleet.models[name]).gpus for name in fleet.queues if not fleet.model_engines.get(name)]
            pending = sum(node.phase is NodePhase.PENDING for node in fleet.nodes.values())
            self.over_submission = max(self.over_submission, pending - nodes_needed(without))
        return effects


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


def run_day(
    trace: Sequence[Request], queue: Queue, rule: Rule | None, end_s: float, policy: Policy | None = None
) -> Day:
    """One run over one trace. ``rule``: ``None`` for the project's own."""
    decider = Counting(policy or Policy(node_types=(NODE,), waiting_max=100_000), rule)
    batch = Batch(NODE, queue.wait_s)
    world = World(
        Trace("growth", times(), trace), Fleet(gpus=0), decider, tick_s=TICK_S, keep_spans=False,
        entry={"keep_alive": KEEP_ALIVE_S}, batch=batch, until_s=end_s, counters_s=COUNTERS_EVERY_S,
    )  # fmt: skip
    tally = world.run()
    return Day(
        batch.jobs, tally.waits_s, tally.outcomes[Outcome.REFUSED], decider.over_submission, batch.nodes_over_time,
        batch.node_hours(end_s), end_s,
    )  # fmt: skip
