"""The ledger: the requested blocks and their jobs. One JSON file, written before each action.

Ray's autoscaler and Parsl's providers keep their state in memory; the ledger remains when their process has ended. A
block is recorded as ``submitting`` before its job is submitted, so that no job can exist that the ledger does not name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from gateway_plugin.errors import ServiceError
from gateway_plugin.files import Garbled
from gateway_plugin.phases import BlockPhase as BlockPhase
from gateway_plugin.processes import Mark
from gateway_plugin.state_file import State, StateFile

_VERSION = 1
_ENDED_KEPT = 50
"""How many ended blocks of each type are kept, for display and as evidence for the back-off of a node type."""


@dataclass(frozen=True)
class Job:
    """A scheduler's job, with what identifies it later.

    For a local job ``pid``, ``started``, ``ticks`` and ``boot`` name its process, as a ``Mark`` does. ``script`` is the
    file that runs, if the scheduler reports it.
    """

    id: str
    pid: int | None = None
    started: float | None = None
    script: str | None = None
    ticks: int = 0
    boot: str = ""

    @property
    def mark(self) -> Mark | None:
        """Its process; ``None`` if it is not a local job, or ended before it was first observed."""
        if self.pid is None or self.started is None:
            return None
        return Mark(self.pid, self.started, self.ticks, self.boot)


@dataclass(frozen=True)
class Block:
    """One block. ``name`` is its Ray instance id and part of its job's name. Times are seconds since the epoch."""

    name: str
    type: str
    phase: BlockPhase
    asked_at: float
    job: Job | None = None
    ended_at: float | None = None
    reason: str | None = None
    never_clears: bool = False
    """For a pending block: whether ``reason`` is one that does not clear by itself, as the scheduler's module decided.
    """
    node: str | None = None
    """The node where it runs or ran, if the scheduler reports it."""
    starts_at: float | None = None
    """When its job started; for a pending job, the scheduler's estimate. ``None`` once it is certain that it never
    started: an estimate must not be taken for a start."""
    ends_at: float | None = None
    """When its walltime ends."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Ray's tags, set by its autoscaler."""

    def ending(self, phase: BlockPhase, now: float, reason: str | None = None) -> Block:
        """This block with its end recorded; unchanged if it had one."""
        return self if self.phase.ended else replace(self, phase=phase, ended_at=now, reason=reason or self.reason)

    def told_to_end(self) -> Block:
        """This block, cancelled. The start estimate of a pending block no longer applies."""
        return replace(self, phase=BlockPhase.CANCELLING, starts_at=None if self.phase.queued else self.starts_at)


class LedgerState(State):
    """The ledger's file. Keys of a block that a later version added are ignored."""

    version: int = _VERSION
    blocks: tuple[Block, ...]


def pruned(blocks: Mapping[str, Block], keep: int = _ENDED_KEPT) -> dict[str, Block]:
    """All blocks that have not ended, and of each type the ``keep`` most recently ended ones."""
    ended: dict[str, list[Block]] = {}
    for block in sorted((b for b in blocks.values() if b.phase.ended), key=lambda b: (b.ended_at or 0.0, b.name)):
        ended.setdefault(block.type, []).append(block)
    dropped = {block.name for of_type in ended.values() for block in of_type[: max(0, len(of_type) - keep)]}
    return {name: block for name, block in blocks.items() if name not in dropped}


class LedgerGarbled(ServiceError):
    """The ledger's file exists and is garbled."""


class Ledger:
    """The ledger's file. One writer at a time: the autoscaler's process, or ``down`` after that has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = StateFile(path, LedgerState)

    def read(self) -> dict[str, Block]:
        """Every recorded block, by name. Raises ``LedgerGarbled`` if the file is garbled."""
        try:
            found = self._file.read()
        except Garbled as error:
            raise LedgerGarbled(
                f"{error}. It names the jobs that are running; 'gateway down' and 'up' find them again by their names."
            ) from None
        return {} if found is None else {block.name: block for block in found.blocks}

    def write(self, blocks: Mapping[str, Block]) -> None:
        """Replace the file, 0600, atomically; it is on disk when this returns. Raises ``OSError``."""
        self._file.write(_state(blocks))

    def begin_anew(self, blocks: Mapping[str, Block]) -> Path:
        """``write`` where the file is garbled. Returns the garbled file's new path. Raises ``OSError``; the garbled
        file then stays in place: a new one without it would have no blocks."""
        return self._file.replace_garbled(_state(blocks))


def _state(blocks: Mapping[str, Block]) -> LedgerState:
    return LedgerState(blocks=tuple(pruned(blocks).values()))
