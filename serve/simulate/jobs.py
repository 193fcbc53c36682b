"""The batch system of the simulated world: jobs that wait in a queue, run one node each, and are given back.

Blocks end when the decider releases them; walltimes are left out. Both delays were measured on a real Slurm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from serve.core import events as ev
from serve.core.policy import NodeTypeSpec
from serve.simulate.agents import Agents
from serve.simulate.clock import Clock

BOOT_S = 15.0
"""From a job's start until its agent is there."""
LEAVE_S = 12.0
"""From giving a node back until its job has ended."""


@dataclass
class Job:
    """One job: submitted, started (or never), ended (or not yet)."""

    submitted: float
    started: float | None = None
    ended: float | None = None


@dataclass
class Batch:
    """What its jobs give, and what became of them."""

    node_type: NodeTypeSpec
    wait_s: Callable[[], float]
    """How long the next job waits in the queue."""
    jobs: dict[str, Job] = field(default_factory=dict)
    nodes_over_time: list[tuple[float, int, int]] = field(default_factory=list)
    """(time, running, pending) at every change."""

    def node_hours(self, end_s: float) -> float:
        """Sum of every job's time from its start to its end; only that is paid."""
        ends = ((job.started, end_s if job.ended is None else job.ended) for job in self.jobs.values())
        return sum(min(end, end_s) - start for start, end in ends if start is not None) / 3600


class Nodes:
    """The nodes that were asked for: pending, booting, or up with an agent."""

    def __init__(self, batch: Batch, clock: Clock, agents: Agents, tell: Callable[[ev.Event], None]) -> None:
        self._batch, self._clock, self._agents, self._tell = batch, clock, agents, tell
        self._states: dict[str, str] = {}

    @property
    def pending(self) -> int:
        """Jobs in the queue."""
        return sum(state == "pending" for state in self._states.values())

    def ask_for(self, node: str) -> None:
        self._states[node] = "pending"
        self._batch.jobs[node] = Job(self._clock.now)
        self._clock.after(self._batch.wait_s(), lambda: self._starts(node))
        self._note()

    def _starts(self, node: str) -> None:
        if self._states.get(node) == "pending":
            self._states[node] = "booting"
            self._batch.jobs[node].started = self._clock.now
            self._clock.after(BOOT_S, lambda: self._joins(node))
            self._note()

    def _joins(self, node: str) -> None:
        if self._states.get(node) == "booting":
            self._states[node] = "up"
            kind = self._batch.node_type
            self._agents.joins(node, kind.gpu_mib)
            asleep = self._agents.sleep_mib
            self._tell(
                ev.NodeJoined(node, kind.name, f"gw-{node}", "10.0.0.1", kind.host_mib, kind.gpu_mib, sleep_mib=asleep)
            )

    def give_back(self, node: str) -> None:
        """A job that never started costs nothing."""
        if self._states.pop(node) == "up":
            self._agents.leaves(node)
        job, now = self._batch.jobs[node], self._clock.now
        job.ended = now if job.started is None else now + LEAVE_S
        self._note()

    def _note(self) -> None:
        pending = self.pending
        self._batch.nodes_over_time.append((self._clock.now, len(self._states) - pending, pending))
