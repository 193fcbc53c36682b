"""When a node's block ends: what its walltime, a notice and the ledger say of it."""

from __future__ import annotations

from dataclasses import replace

from serve.core.change import Change
from serve.core.events import BlocksSeen, NodeLeaves, SeenBlock
from serve.core.fleet import Node, Policy
from serve.core.troubles import judge

ENDED = frozenset({"completed", "cancelled", "failed", "expired", "lost"})
"""Phases of a block that holds nothing any more."""


def blocks_seen(change: Change, event: BlocksSeen) -> None:
    """The ledger as it is now, whole."""
    change.blocks = {block.name: block for block in event.blocks}
    for node in list(change.nodes.rows.values()):
        if node.block in change.blocks:
            know_end(change, node)
    change.joined_blocks &= frozenset(change.blocks)
    judge(change)


def node_leaves(change: Change, event: NodeLeaves) -> None:
    """Its block was told to end; the last word on how long it stays counts."""
    node = change.nodes.rows.get(event.node)
    if node is not None:
        know_end(change, replace(node, notice_until=event.until))


def know_end(change: Change, node: Node) -> None:
    """Put ``node`` with what is known of its end.

    (1) its walltime; (2) its block is being cancelled and nobody gave it a notice: as if it had one; (3) a notice: it
    leaves now and has until then; (4) its block has ended (the node may seem alive for a while): at once.
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
    changed = replace(node, ends_at=ends_at, drain_at=drain_at, leave_at=leave_at)
    if changed != change.nodes.rows.get(node.id):
        change.nodes.put(node.id, changed)


def _earliest(*times: float | None) -> float:
    return min(time for time in times if time is not None)


def _by_walltime(block: SeenBlock | None, policy: Policy) -> tuple[float | None, float | None]:
    """When a node of ``block`` takes no new request, and when it leaves."""
    if block is None or block.ends_at is None:
        return None, None
    leave_at = block.ends_at - policy.leave_before_end_s
    before = policy.drain_before_end_s
    if block.starts_at is not None:
        before = min(before, max(0.0, block.ends_at - block.starts_at) / 4)
    return leave_at - before, leave_at
