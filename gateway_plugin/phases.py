"""Phases of a block: one vocabulary for schedulers, ledger, controller and its core."""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property


class BlockPhase(StrEnum):
    """Where a block is. Ended phases are final: the first one stays."""

    SUBMITTING = "submitting"
    """In the ledger; the scheduler may or may not have its job, which is searched for before the block is given up."""
    PENDING = "pending"
    """In the scheduler's queue. Counts against ``max_blocks``."""
    RUNNING = "running"
    """Its job runs. Whether Ray has started in it is reported by Ray."""
    CANCELLING = "cancelling"
    """Its job was cancelled and has not been seen to end, so that it still occupies a place."""
    COMPLETED = "completed"
    """Ended by itself with exit code 0: released by Ray."""
    CANCELLED = "cancelled"
    """Ended because it was cancelled."""
    FAILED = "failed"
    """Ended with another exit code, or was never accepted; ``reason`` says more."""
    EXPIRED = "expired"
    """Walltime ended: normal, never counts as a failure."""
    LOST = "lost"
    """Ended without a report: killed from outside, the machine rebooted, or its submission never happened."""

    @cached_property
    def ended(self) -> bool:
        """Whether the block holds no resources any more."""
        return self in _ENDED

    @cached_property
    def queued(self) -> bool:
        """Whether its job has not started."""
        return self in (BlockPhase.SUBMITTING, BlockPhase.PENDING)


_ENDED = frozenset({BlockPhase.COMPLETED, BlockPhase.CANCELLED, BlockPhase.FAILED, BlockPhase.EXPIRED, BlockPhase.LOST})
