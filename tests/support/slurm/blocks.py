"""Blocks of a virtual Slurm for tests of ``Jobs``, without a pool."""

from __future__ import annotations

import time
from typing import Any

from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider

from gateway_plugin.blocks.ledger import Block, BlockPhase
from gateway_plugin.schedulers.base import JobStatus, Scheduler
from tests.support.clusters import wait_for

ENDLESS = "trap 'exit 0' TERM\nwhile true; do sleep 0.1 & wait $!; done"
"""A job that runs until SIGTERM."""


def slurm_provider(**options: Any) -> SlurmProvider:
    """A provider as a site file has it; jobs share nodes unless ``exclusive=True``."""
    return SlurmProvider(**{"launcher": SimpleLauncher(), "exclusive": False, "walltime": "00:05:00", **options})


def submitted(jobs: Scheduler, name: str, script: str = ENDLESS) -> Block:
    """A block called ``name`` whose job was just submitted."""
    job = jobs.submit(name, script)
    return Block(name=name, type="node", phase=BlockPhase.PENDING, asked_at=time.time(), job=job)


def look(jobs: Scheduler, block: Block) -> JobStatus | None:
    return jobs.status([block]).get(block.name)


def reaches(jobs: Scheduler, block: Block, phase: BlockPhase, timeout_s: float = 30) -> JobStatus:
    """The status of ``block`` when it has reached ``phase``."""

    def there() -> JobStatus | None:
        seen = look(jobs, block)
        return seen if seen is not None and seen.phase is phase else None

    found: JobStatus = wait_for(there, f"{block.name} {phase.value}", timeout_s)
    return found
