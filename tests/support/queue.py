"""A batch queue without a machine, and a Parsl-like provider over it, with the limits of Parsl's own.

``Scheduler`` is the truth and outlives providers, as ``slurmctld`` does; ``QueueProvider`` has only the jobs that it
submitted itself and raises ``KeyError`` for others; ``QueueJobs`` finds jobs by name, as one over ``squeue`` would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gateway_plugin.blocks.ledger import Block, BlockPhase, Job
from gateway_plugin.errors import ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.schedulers.base import JobStatus


@dataclass
class Scheduler:
    """Jobs by id: ``[name, phase]``. Tests change them; ``refuse`` is its error for the next submit."""

    jobs: dict[str, tuple[str, BlockPhase]] = field(default_factory=dict)
    refuse: str | None = None
    silent: bool = False
    """It answers no query, as a busy controller."""
    submits: int = 0

    def put(self, name: str) -> str:
        self.submits += 1
        job_id = str(1000 + self.submits)
        self.jobs[job_id] = (name, BlockPhase.PENDING)
        return job_id

    def move(self, name: str, phase: BlockPhase) -> None:
        """Let the job called ``name`` be in ``phase``."""
        for job_id, (job_name, _) in self.jobs.items():
            if job_name == name:
                self.jobs[job_id] = (name, phase)


class QueueProvider:
    """The three verbs of a Parsl provider."""

    nodes_per_block = 1

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.resources: dict[str, str] = {}

    def submit(self, command: str, tasks_per_node: int, job_name: str) -> str:
        if self.scheduler.refuse is not None:
            raise ValueError(self.scheduler.refuse)
        job_id = self.scheduler.put(job_name)
        self.resources[job_id] = job_name
        return job_id

    def status(self, job_ids: Sequence[str]) -> list[BlockPhase]:
        return [self.scheduler.jobs[self.resources[job_id] and job_id][1] for job_id in job_ids]

    def cancel(self, job_ids: Sequence[str]) -> list[bool]:
        for job_id in job_ids:
            self.scheduler.move(self.resources[job_id], BlockPhase.CANCELLED)
        return [True for _ in job_ids]

    def gateway_jobs(self, layout: Layout) -> QueueJobs:
        """How the gateway finds this provider's jobs again."""
        return QueueJobs(self)


class QueueJobs:
    """A ``schedulers.base.Scheduler`` over a ``QueueProvider``: the queue keeps jobs that the provider forgot."""

    in_doubt_s = 30.0

    def __init__(self, provider: QueueProvider) -> None:
        self.provider = provider

    def submit(self, name: str, script: str) -> Job:
        try:
            return Job(id=self.provider.submit(script, 1, name))
        except ValueError as error:
            raise ServiceError(f"block {name}: {error}") from None

    def status(self, blocks: Sequence[Block]) -> Mapping[str, JobStatus]:
        if self.provider.scheduler.silent:
            return {}
        jobs = self.provider.scheduler.jobs
        return {
            block.name: JobStatus(jobs[block.job.id][1])
            for block in blocks
            if block.job is not None and block.job.id in jobs
        }

    def find(self, name: str) -> Job | None:
        found = [job_id for job_id, (job_name, _) in self.provider.scheduler.jobs.items() if job_name == name]
        return Job(id=found[-1]) if found else None

    def cancel(self, block: Block, forced: bool) -> None:
        if block.job is not None and not self.provider.scheduler.jobs[block.job.id][1].ended:
            self.provider.resources.setdefault(block.job.id, block.name)  # adopt, or Parsl raises KeyError
            self.provider.cancel([block.job.id])
