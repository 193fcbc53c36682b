"""The blocks: one state, one ledger, one lock, used by Ray's provider and by ``down``. Independent of Ray.

Every change is in the ledger before it takes effect. While the ledger cannot be written, no block is submitted; the
state of existing blocks is kept in memory and written once possible. A scheduler's command runs outside the lock, so
that a slow ``sbatch`` never blocks queries for the other blocks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from gateway_plugin.blocks.ledger import Block, BlockPhase, Job, Ledger, pruned
from gateway_plugin.blocks.stop_files import CancelRequests, mark_to_leave
from gateway_plugin.errors import GatewayError, ServiceError
from gateway_plugin.schedulers.base import JobStatus, Scheduler
from gateway_plugin.site import what_went_wrong

log = logging.getLogger(__name__)

CANCEL_GRACE_S = 40.0
"""Grace period of a cancelled block before it is killed: Ray 10 s, engines 10 s, and a margin."""

SPACING_S = 10.0
"""After a block failed early or was ended by an operator, the pause until another of its type is submitted: Ray asks
every two seconds, after an operator's end until it has processed the withdrawn demand. The back-off of a type that
keeps failing is the controller's decision."""

_LIVED_S = 60.0
_SUBMITS = BlockPhase.SUBMITTING
_CANCELS = BlockPhase.CANCELLING
_FAILS = (BlockPhase.FAILED, BlockPhase.LOST)


def after_look(block: Block, seen: JobStatus | None, now: float) -> Block:
    """The block after one poll of its job.

    (1) ended: the first end stays. (2) status unknown: unchanged. (3) cancelled and gone: cancelled, under any status
    of the scheduler. (4) cancelled and still there: unchanged. (5) gone. (6) pending or running: as reported.
    """
    if block.phase.ended or seen is None:  # (1) (2)
        return block
    if block.phase is _CANCELS:
        return _over(block, seen, BlockPhase.CANCELLED, now) if seen.phase.ended else block  # (3) (4)
    if seen.phase.ended:  # (5)
        return _over(block, seen, seen.phase, now)
    return replace(  # (6)
        block,
        phase=seen.phase,
        reason=seen.reason,
        never_clears=seen.never_clears,
        node=seen.node,
        starts_at=seen.starts_at,
        ends_at=seen.ends_at,
    )


def _over(block: Block, seen: JobStatus, phase: BlockPhase, now: float) -> Block:
    """The ended block. Its start is (1) what the scheduler reports, if it ran: it was running before, or has a node;
    (2) what was recorded when it was cancelled; (3) none, if it left the queue without having run: a known start is an
    estimate."""
    node = seen.node or block.node
    if node is not None or block.phase is BlockPhase.RUNNING:  # (1)
        starts_at = seen.starts_at or block.starts_at
    else:
        starts_at = block.starts_at if block.phase is _CANCELS else None  # (2) (3)
    return replace(block.ending(phase, now, seen.reason), node=node, starts_at=starts_at)


def after_search(block: Block, found: Job | None, waited_s: float, in_doubt_s: float, now: float) -> Block:
    """A block with an interrupted submit, after a search for its job.

    (1) found: the block has this job. (2) not yet, and it may still appear: unchanged. (3) it never started.
    """
    if found is not None:  # (1)
        phase = _CANCELS if block.phase is _CANCELS else BlockPhase.PENDING
        return replace(block, job=found, phase=phase, reason=None)
    if waited_s < in_doubt_s:  # (2)
        return block
    said = f" ({block.reason})" if block.reason else ""
    return block.ending(BlockPhase.LOST, now, f"its submit was cut short{said} and no job of its name was found")  # (3)


class BlockPool:
    """All blocks of a gateway. Thread-safe. A new pool over the same ledger takes over every block in it.

    ``marks``: their folder; one is set before a block is cancelled, and when its job has ended.
    ``clock``: the wall clock, for times in the ledger. ``monotonic``: for delays of this pool.
    """

    def __init__(
        self,
        ledger: Ledger,
        schedulers: Mapping[str, Scheduler],
        max_blocks: Mapping[str, int],
        clock: Callable[[], float] = time.time,
        marks: Path | None = None,
        requests: CancelRequests | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._marks = marks
        self._requests = requests
        self._schedulers = schedulers
        self._max_blocks = max_blocks
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.RLock()
        self._blocks = ledger.read()
        self._submitting: set[str] = set()
        """Being submitted by this process: not in doubt."""
        self._adopted_at = monotonic()
        self._doubted_at: dict[str, float] = {}
        self._cancelled_at: dict[str, float] = {}
        self._late = False
        """The ledger's file is out of date: it could not be written."""
        self._spaced: dict[str, tuple[str, float]] = {}
        """By type: the reason for a pause of submits, and its end."""
        for block in self.holding():
            log.info("block adopted name=%s phase=%s job=%s", block.name, block.phase.value, block.job and block.job.id)

    def holding(self) -> tuple[Block, ...]:
        """Every block that may hold a node: all that have not ended, oldest first."""
        with self._lock:
            return tuple(
                sorted((b for b in self._blocks.values() if not b.phase.ended), key=lambda b: (b.asked_at, b.name))
            )

    def find(self, name: str) -> Block | None:
        """The block ``name``, ended or not."""
        with self._lock:
            return self._blocks.get(name)

    def tag(self, name: str, tags: Mapping[str, str]) -> None:
        """Add Ray's tags to a block."""
        with self._lock:
            block = self._blocks[name]
            if not tags.items() <= block.tags.items():
                self._put(replace(block, tags={**block.tags, **tags}))

    def submit(self, name: str, node_type: str, script: str, tags: Mapping[str, str]) -> Block:
        """Submit one block: recorded, then submitted, then its job recorded.

        Raises:
            ServiceError: it cannot be recorded; the type has its ``max_blocks`` already (ending ones count); one of its
                blocks has just failed or was ended by an operator; or the scheduler rejected it: then the block has
                ended as ``failed`` with the scheduler's message.
        """
        with self._lock:
            self._admit(node_type)
            self._put(Block(name=name, type=node_type, phase=_SUBMITS, asked_at=self._clock(), tags=dict(tags)))
            if self._late:  # a job that the ledger does not name could be lost
                del self._blocks[name]
                raise ServiceError(f"no block of type {node_type} is asked for: {self._ledger.path} cannot be written")
            self._submitting.add(name)
        try:
            job = self._schedulers[node_type].submit(name, script)
        except GatewayError as error:
            with self._lock:
                self._put(self._blocks[name].ending(BlockPhase.FAILED, self._clock(), error.message))
            raise
        except Exception as error:  # a command that timed out, or another failure: there may be a job or not
            with self._lock:
                self._put(replace(self._blocks[name], reason=what_went_wrong(error)))
            raise
        finally:  # refresh searches for it
            with self._lock:
                self._submitting.discard(name)
                self._doubted_at[name] = self._monotonic()
        with self._lock:
            block = self._blocks[name]  # it may have been cancelled meanwhile: then the next refresh cancels the job
            block = replace(block, job=job, phase=BlockPhase.PENDING if block.phase is _SUBMITS else block.phase)
            self._put(block)
            return block

    def refuse(self, name: str, node_type: str, reason: str, tags: Mapping[str, str]) -> None:
        """Record a block that cannot be submitted, as ``failed`` for ``reason``. Raises ``ServiceError`` where
        ``submit`` would: at most as many as blocks that the scheduler rejects."""
        with self._lock:
            self._admit(node_type)
            block = Block(name=name, type=node_type, phase=_SUBMITS, asked_at=self._clock(), tags=dict(tags))
            self._put(block.ending(BlockPhase.FAILED, self._clock(), reason))

    def _admit(self, node_type: str) -> None:
        taken = [block.name for block in self.holding() if block.type == node_type]
        if len(taken) >= self._max_blocks[node_type]:
            raise ServiceError(f"no more than {self._max_blocks[node_type]} blocks of type {node_type}: {taken}")
        why, until = self._spaced.get(node_type, ("", 0.0))
        if (wait_s := until - self._monotonic()) > 0:
            raise ServiceError(f"a block of type {node_type} {why}; the next can be submitted in {wait_s:.0f} s")

    def cancel(self, names: Iterable[str]) -> None:
        """Cancel blocks. They hold their node until their job is gone. Unknown or ended: no effect."""
        told = []
        with self._lock:
            for name in names:
                block = self._blocks.get(name)
                if block is not None and not block.phase.ended and block.phase is not _CANCELS:
                    block = block.told_to_end()
                    self._put(block)
                    self._cancelled_at[name] = self._monotonic()
                    told.append(block)
        for block in told:
            self._mark(block)
            if block.job is not None:
                self._schedulers[block.type].cancel(block, forced=False)

    def refresh(self) -> tuple[Block, ...]:
        """Poll every job, record changes, search for jobs in doubt, cancel again those that do not end.

        Requested cancellations are processed first. Returns the blocks that hold a node afterwards.
        """
        with self._lock:
            if self._late:
                self._save()
        self._cancel_asked()
        now, moment = self._clock(), self._monotonic()
        held = [block for block in self.holding() if block.name not in self._submitting]
        for block in held:
            if block.job is None:
                scheduler = self._schedulers[block.type]
                waited_s = moment - self._doubted_at.get(block.name, self._adopted_at)
                try:
                    found = scheduler.find(block.name)
                except GatewayError as error:  # the search failed: the other blocks must be processed all the same
                    log.warning("block not looked for name=%s said=%s", block.name, error.message)
                    continue
                self._change(block, after_search(block, found, waited_s, scheduler.in_doubt_s, now))
        known = [block for block in held if block.job is not None]
        for node_type, scheduler in self._schedulers.items():
            blocks = [block for block in known if block.type == node_type]
            seen = scheduler.status(blocks) if blocks else {}
            for block in blocks:
                self._change(block, after_look(block, seen.get(block.name), now))
        for block in self.holding():
            if block.phase is _CANCELS and block.job is not None:
                since = self._cancelled_at.setdefault(block.name, moment)
                self._schedulers[block.type].cancel(block, forced=moment - since > CANCEL_GRACE_S)
        return self.holding()

    def _cancel_asked(self) -> None:
        """A request is removed only when the ledger has it: after a crash in between it is read again."""
        if self._requests is None:
            return
        try:
            asked = self._requests.names()
            self._hold(asked)
            self.cancel(asked)
            for name in asked:
                self._requests.done(name)
        except OSError as error:  # read again at the next refresh; the jobs must be polled all the same
            log.warning("requests unreadable error=%s", error)

    def _hold(self, names: Iterable[str]) -> None:
        with self._lock:
            for name in names:
                block = self._blocks.get(name)
                if block is not None and not block.phase.ended:
                    self._space(block.type, "was ended by hand")

    def _space(self, node_type: str, why: str) -> None:
        self._spaced[node_type] = why, self._monotonic() + SPACING_S

    def _change(self, before: Block, after: Block) -> None:
        """Apply what was learnt about a block while the lock was free; it may have been cancelled meanwhile."""
        if after == before:
            return
        if after.phase.ended and after.phase is not BlockPhase.COMPLETED:
            # A killed script did not clean up; the block holds its node until none of its processes is left.
            # And a job that Slurm gave up may still run, on a node whose slurmd died: its script checks the mark.
            self._mark(after)
            self._schedulers[after.type].cancel(after, forced=True)
        with self._lock:
            current = self._blocks[before.name]
            if current.phase is _CANCELS:
                after = replace(after, phase=BlockPhase.CANCELLED) if after.phase.ended else after.told_to_end()
            # The observed fields; its tags are Ray's, and may have changed meanwhile.
            self._put(replace(after, tags=current.tags))

    def _mark(self, block: Block) -> None:
        if self._marks is not None:
            mark_to_leave(self._marks, block.name)

    def _put(self, block: Block) -> None:
        before = self._blocks.get(block.name)
        self._blocks[block.name] = block
        if block.phase.ended:
            if block.phase in _FAILS and (block.ended_at or 0.0) - block.asked_at <= _LIVED_S:
                self._space(block.type, "has just failed")
            self._doubted_at.pop(block.name, None)
            self._cancelled_at.pop(block.name, None)
            self._blocks = pruned(self._blocks)
        self._save()
        if before is None or before.phase is not block.phase:
            log.info(
                "block %s name=%s type=%s job=%s reason=%s",
                block.phase.value,
                block.name,
                block.type,
                block.job.id if block.job else None,
                block.reason,
            )

    def _save(self) -> None:
        try:
            self._ledger.write(self._blocks)
        except OSError as error:
            if not self._late:
                log.warning("ledger not written path=%s said=%s", self._ledger.path, error)
            self._late = True
        else:
            self._late = False


def end_all(pool: BlockPool, deadline_s: float, pause_s: float = 0.2) -> tuple[Block, ...]:
    """Cancel every block and wait until they are gone, without Ray: for ``down``, after the head has ended.

    Returns the blocks that were still there at the deadline: normally none.
    """
    until = time.monotonic() + deadline_s
    pool.cancel([block.name for block in pool.holding()])
    while left := pool.refresh():
        if time.monotonic() > until:
            break
        time.sleep(pause_s)
    return left
