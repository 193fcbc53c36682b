"""The blocks: one state, one ledger, one lock; what Ray's provider and ``down`` act on. No Ray in here.

Every change is in the ledger before it is acted on. Where that cannot be written no block is asked for; what is known
of those that are there counts, and is written when there is room. A scheduler's command runs outside the lock, so that
a slow ``sbatch`` never hides the other blocks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from gateway_plugin.blocks.ledger import Block, BlockPhase, Job, Ledger, pruned
from gateway_plugin.blocks.stop_files import CancelRequests, LeaveMarks
from gateway_plugin.errors import GatewayError, ServiceError
from gateway_plugin.schedulers.base import JobStatus, Scheduler
from gateway_plugin.site import what_went_wrong

log = logging.getLogger(__name__)

CANCEL_GRACE_S = 40.0
"""How long a block may clean up before it is ended without being asked: Ray 10 s, engines 10 s, and room."""

SPACING_S = 10.0
"""After a block failed early or was ended by hand no other of its type is submitted for so long: Ray asks every two
seconds, and for one that was ended by hand until it has seen what was withdrawn with it. How long a type that keeps
failing is left alone is the controller's to decide."""

_LIVED_S = 60.0
_SUBMITS = BlockPhase.SUBMITTING
_CANCELS = BlockPhase.CANCELLING
_FAILS = (BlockPhase.FAILED, BlockPhase.LOST)


def after_look(block: Block, seen: JobStatus | None, now: float) -> Block:
    """The block after one look at its job.

    (1) ended: the first end stays. (2) nothing can be said: unchanged. (3) told to end and gone: cancelled, whatever
    the scheduler calls it. (4) told to end and still there: unchanged. (5) gone. (6) pending or running: as seen.
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
    """It ended. Its start is (1) what the scheduler says, if it ran: it was seen running, or has a node; (2) what it
    was when it was told to end; (3) none, if it left the queue without having run: what is known is an estimate."""
    node = seen.node or block.node
    if node is not None or block.phase is BlockPhase.RUNNING:  # (1)
        starts_at = seen.starts_at or block.starts_at
    else:
        starts_at = block.starts_at if block.phase is _CANCELS else None  # (2) (3)
    return replace(block.ending(phase, now, seen.reason), node=node, starts_at=starts_at)


def after_search(block: Block, found: Job | None, waited_s: float, in_doubt_s: float, now: float) -> Block:
    """A block whose submit was cut short, after its job was looked for.

    (1) found: it is that job. (2) not yet, and it may still show up: unchanged. (3) it never started.
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

    ``marks``: put before a block is cancelled, and when its job is seen to be over.
    ``clock``: the wall clock, for what the ledger keeps. ``monotonic``: for what this pool waits for.
    """

    def __init__(
        self,
        ledger: Ledger,
        schedulers: Mapping[str, Scheduler],
        max_blocks: Mapping[str, int],
        clock: Callable[[], float] = time.time,
        marks: LeaveMarks | None = None,
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
        """Being submitted by this very process: not in doubt."""
        self._adopted_at = monotonic()
        self._doubted_at: dict[str, float] = {}
        self._cancelled_at: dict[str, float] = {}
        self._late = False
        """The ledger's file is not as it should be: it could not be written."""
        self._spaced: dict[str, tuple[str, float]] = {}
        """By type: why, and until when, nothing is submitted."""
        for block in self.holding():
            log.info("block adopted name=%s phase=%s job=%s", block.name, block.phase.value, block.job and block.job.id)

    def holding(self) -> tuple[Block, ...]:
        """Every block that may hold a place: all that have not ended, oldest first."""
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
        """Ask for one block: written down, then submitted, then its job written down.

        Raises:
            ServiceError: it cannot be written down;
                the type has its ``max_blocks`` already (one that is still ending counts); one of its blocks has just
                failed or was ended by hand; or the scheduler refused: then this one has ended as ``failed`` with the
                scheduler's words.
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
        except Exception as error:  # a command that timed out, or anything else: the job may be there or not
            with self._lock:
                self._put(replace(self._blocks[name], reason=what_went_wrong(error)))
            raise
        finally:  # refresh looks for it
            with self._lock:
                self._submitting.discard(name)
                self._doubted_at[name] = self._monotonic()
        with self._lock:
            block = self._blocks[name]  # it may have been cancelled meanwhile: then the next refresh tells the job
            block = replace(block, job=job, phase=BlockPhase.PENDING if block.phase is _SUBMITS else block.phase)
            self._put(block)
            return block

    def refuse(self, name: str, node_type: str, reason: str, tags: Mapping[str, str]) -> None:
        """Write down a block that cannot be submitted, as ``failed`` for ``reason``. Raises ``ServiceError`` where
        ``submit`` would: no more of them than of blocks that the scheduler refuses."""
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
        """Tell blocks to end. They hold their place until their job is seen to be gone. Unknown or ended: nothing."""
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
        """Look at every job, write down what changed, search for jobs in doubt, press those that do not end.

        Blocks that somebody asked to be ended are told so first. Gives what holds a place after it.
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
                except GatewayError as error:  # it could not be looked for: the others must be seen to all the same
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
        """A request is dropped only when the ledger has it: after a crash in between it is read again."""
        if self._requests is None:
            return
        try:
            asked = self._requests.names()
            self._hold(asked)
            self.cancel(asked)
            for name in asked:
                self._requests.done(name)
        except OSError as error:  # read again at the next look; the jobs must be seen to all the same
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
        """Take over what was learnt of a block while the lock was free; it may have been cancelled meanwhile."""
        if after == before:
            return
        if after.phase.ended and after.phase is not BlockPhase.COMPLETED:
            # Whoever killed its script did not clean up after it; it holds its place until nothing of it is left.
            # And a job that Slurm gave up may still run, on a node whose slurmd died: its script looks for the mark.
            self._mark(after)
            self._schedulers[after.type].cancel(after, forced=True)
        with self._lock:
            current = self._blocks[before.name]
            if current.phase is _CANCELS:
                after = replace(after, phase=BlockPhase.CANCELLED) if after.phase.ended else after.told_to_end()
            # Everything learnt by looking; its tags are Ray's, and may have changed meanwhile.
            self._put(replace(after, tags=current.tags))

    def _mark(self, block: Block) -> None:
        if self._marks is not None:
            self._marks.put(block.name)

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
    """Cancel every block and wait for them to be gone, without Ray: for ``down``, after the head has ended.

    Gives the blocks that were still there at the deadline: normally none.
    """
    until = time.monotonic() + deadline_s
    pool.cancel([block.name for block in pool.holding()])
    while left := pool.refresh():
        if time.monotonic() > until:
            break
        time.sleep(pause_s)
    return left
