"""What ledger, notice and walltime say of a node's block: when it ends, and how long the next one takes to get."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from statistics import median

from serve.core.change import Change
from serve.core.events import BlocksSeen, NodeLeaves, SeenBlock
from serve.core.fleet import Fleet, Node, NodePhase, Policy
from serve.core.troubles import judge

ENDED = frozenset({"completed", "cancelled", "failed", "expired", "lost"})
"""Phases of a block that holds nothing any more."""
QUEUED = frozenset({"submitting", "pending"})
"""Phases of a block whose job has not started."""
_RAN = frozenset({"running", "completed", "expired"})
"""Phases of a block whose job did."""
_LATELY = 5
"""Of so many blocks of a type is remembered how long they took."""


def blocks_seen(change: Change, event: BlocksSeen) -> None:
    """The ledger as it is now, whole."""
    change.blocks = {block.name: block for block in event.blocks}
    change.queue_wait_s = _queue_waits(event.blocks, change.now)
    for node in list(change.nodes.rows.values()):
        if node.block in change.blocks:
            know_block(change, node)
    change.joined_blocks &= frozenset(change.blocks)
    judge(change)


def node_leaves(change: Change, event: NodeLeaves) -> None:
    """Its block was told to end; the last word on how long it stays counts."""
    node = change.nodes.rows.get(event.node)
    if node is not None:
        know_block(change, replace(node, notice_until=event.until))


def know_block(change: Change, node: Node) -> None:
    """Put ``node`` with what is known of its block's end; and remember how long it took to start.

    (1) its walltime; (2) its block is being cancelled and nobody gave it a notice: as if it had one; (3) a notice: it
    leaves now and has until then; (4) its block has ended (the node may seem alive for a while): at once; (5) it has
    more time than was thought: not near its end any more.
    """
    block = change.blocks.get(node.block)
    drain_at, leave_at = _by_walltime(block, change.policy)  # (1)
    if block is not None and block.phase == "cancelling" and node.notice_until is None:  # (2)
        node = replace(node, notice_until=change.now + change.policy.notice_s)
    ended = block is not None and block.phase in ENDED
    if node.notice_until is not None or ended:  # (3)
        drain_at = _earliest(drain_at, node.drain_at, change.now)
        leave_at = _earliest(leave_at, node.notice_until)
    if block is not None and ended:  # (4)
        leave_at = _earliest(leave_at, block.ended_at, change.now)
    ends_at = node.ends_at if block is None else block.ends_at
    half_at = None
    if drain_at is not None:
        # A block that took long to start is not past its half before it was of any use: nothing would ever be loaded.
        began = node.since if block is None or block.starts_at is None else block.starts_at
        began = began if node.joined_at is None else node.joined_at
        half_at = drain_at - max(0.0, drain_at - began) / 2
    later = node.drain_at is None or drain_at is None or drain_at > node.drain_at  # (5)
    ending = node.ending and not later
    changed = replace(node, ends_at=ends_at, drain_at=drain_at, half_at=half_at, leave_at=leave_at, ending=ending)
    if changed != change.nodes.rows.get(node.id):
        change.nodes.put(node.id, changed)
    started = block is not None and block.phase not in QUEUED  # else the ledger is behind: it names an expected start
    if block is not None and started and block.starts_at is not None and node.joined_at is not None:
        took = change.block_start_s.rows.get(node.type, ())
        if all(name != node.id for name, _ in took):
            last = (node.id, max(0.0, node.joined_at - block.starts_at))
            change.block_start_s.put(node.type, (*took, last)[-_LATELY:])


def _earliest(*times: float | None) -> float | None:
    return min((time for time in times if time is not None), default=None)


def _by_walltime(block: SeenBlock | None, policy: Policy) -> tuple[float | None, float | None]:
    """When a node of ``block`` takes no new request, and when it leaves."""
    if block is None or block.ends_at is None:
        return None, None
    leave_at = block.ends_at - policy.leave_before_end_s
    before = policy.drain_before_end_s
    if block.starts_at is not None:
        before = min(before, max(0.0, block.ends_at - block.starts_at) / 4)
    return leave_at - before, leave_at


def _queue_waits(blocks: Iterable[SeenBlock], now: float) -> Mapping[str, float]:
    return {kind: max(some[-_LATELY:]) for kind, some in waited_s(blocks, now).items()}


def waited_s(blocks: Iterable[SeenBlock], now: float) -> Mapping[str, list[float]]:
    """Type -> how long in seconds each of its blocks that ever started had waited for it, in the order of starting."""
    waits: dict[str, list[float]] = {}
    started = [(starts_at, b) for b in blocks if (starts_at := _started_at(b, now)) is not None]
    for starts_at, block in sorted(started, key=lambda pair: (pair[0], pair[1].name)):
        waits.setdefault(block.type, []).append(max(0.0, starts_at - block.asked_at))
    return waits


def _started_at(block: SeenBlock, now: float) -> float | None:
    """When its job started; ``None``: it did not. Of one that may never have run, no host known, a start to come or
    after its end is what the scheduler had expected of it while it was in the queue."""
    if block.starts_at is None or block.phase in QUEUED:
        return None
    if block.phase in _RAN or block.host is not None:
        return block.starts_at
    until = now if block.ended_at is None else block.ended_at
    return block.starts_at if block.starts_at <= until else None


def wait_for_node_s(known: Change | Fleet, kind: str) -> float:
    """Seconds from asking for a node of type ``kind`` until it can take an engine, going by the last few."""
    return known.queue_wait_s.get(kind, known.policy.queue_wait_guess_s) + start_s(known, kind)


def start_s(known: Change | Fleet, kind: str) -> float:
    """Seconds from the start of a job of type ``kind`` until its node can take an engine."""
    rows = known.block_start_s.rows if isinstance(known, Change) else known.block_start_s
    took = [seconds for _, seconds in rows.get(kind, ())]
    return median(took) if took else known.policy.block_start_guess_s


def stays(node: Node) -> bool:
    """It takes new engines, and its end is not near."""
    return node.phase is NodePhase.UP and not node.ending


def takes(change: Change, model: str, *, ending: bool) -> Callable[[Node], bool]:
    """Whether a node would serve ``model`` for as long at least as it takes to load there, as far as is known, or is in
    the first half of its time; ``ending``: of those whose end is near, else of the others."""
    until = change.now + 2 * change.load_time_s(model)

    def would(node: Node) -> bool:
        if node.phase is not NodePhase.UP or node.ending is not ending:
            return False
        return (
            node.drain_at is None or until <= node.drain_at or (node.half_at is not None and change.now < node.half_at)
        )

    return would
