"""The ledger: which blocks were asked for, and where their jobs are. One JSON file, written before anything is done.

Ray's autoscaler and Parsl's providers keep what they know in memory; the ledger is what is left when their process is
gone. A block is written down as ``submitting`` before its job is submitted, so that no job can exist that the ledger
does not name.
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
"""Blocks that ended are kept for people to look at, and as evidence of a node type in trouble; so many of each type."""


@dataclass(frozen=True)
class Job:
    """A scheduler's job, so that it can be recognised later.

    For a local job ``pid``, ``started``, ``ticks`` and ``boot`` name its process, as a ``Mark`` does. ``script`` is the
    file that runs, where the scheduler tells.
    """

    id: str
    pid: int | None = None
    started: float | None = None
    script: str | None = None
    ticks: int = 0
    boot: str = ""

    @property
    def mark(self) -> Mark | None:
        """Its process; ``None`` if it is not a local job, or was over before anybody looked."""
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
    """Of a pending one: whether ``reason`` is one that does not clear by itself, as the scheduler's module judged."""
    node: str | None = None
    """Where it runs or ran, where the scheduler says."""
    starts_at: float | None = None
    """When its job started; of a pending one, when the scheduler expects it to. ``None`` once it is certain that it
    never started: an expectation must not be taken for a start."""
    ends_at: float | None = None
    """When its walltime ends."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Ray's tags, as its autoscaler set them."""

    def ending(self, phase: BlockPhase, now: float, reason: str | None = None) -> Block:
        """This block, ended; unchanged if it had ended before."""
        return self if self.phase.ended else replace(self, phase=phase, ended_at=now, reason=reason or self.reason)

    def told_to_end(self) -> Block:
        """This block, told to end. What was expected of one in the queue does not come any more."""
        queued = self.phase in (BlockPhase.SUBMITTING, BlockPhase.PENDING)
        return replace(self, phase=BlockPhase.CANCELLING, starts_at=None if queued else self.starts_at)


class LedgerState(State):
    """The ledger's file. Of a block, keys of a later version are passed over."""

    version: int = _VERSION
    blocks: tuple[Block, ...]


def pruned(blocks: Mapping[str, Block], keep: int = _ENDED_KEPT) -> dict[str, Block]:
    """All blocks that have not ended, and of each type the ``keep`` that ended last."""
    ended: dict[str, list[Block]] = {}
    for block in sorted((b for b in blocks.values() if b.phase.ended), key=lambda b: (b.ended_at or 0.0, b.name)):
        ended.setdefault(block.type, []).append(block)
    dropped = {block.name for of_type in ended.values() for block in of_type[: max(0, len(of_type) - keep)]}
    return {name: block for name, block in blocks.items() if name not in dropped}


class LedgerGarbled(ServiceError):
    """The ledger's file is there and garbled."""


class Ledger:
    """The ledger's file. One writer at a time: the autoscaler's process, or ``down`` after that has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = StateFile(path, LedgerState)

    def read(self) -> dict[str, Block]:
        """Every block written down, by name. Raises ``LedgerGarbled`` if the file is garbled."""
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
        """``write`` where the file is garbled. Returns what it is called now. Raises ``OSError``; it stays
        where it is then: without it there would be no blocks."""
        return self._file.replace_garbled(_state(blocks))


def _state(blocks: Mapping[str, Block]) -> LedgerState:
    return LedgerState(blocks=tuple(pruned(blocks).values()))
