"""Back-off of node types whose blocks fail: derived from the ledger.

It is derived afresh each time, so that a restarted controller has it too. This is the one place that decides when a
node type is requested again; ``gateway_plugin.blocks.pool`` only keeps a lower bound.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway_plugin.phases import BlockPhase
from serve.core.events import SeenBlock
from serve.core.policy import NodeTypeSpec, Policy
from serve.core.state import Cause, NodeTypeBackoff
from serve.core.transaction import Transaction

_DIED = (BlockPhase.FAILED, BlockPhase.LOST)


def review_backoffs(tx: Transaction) -> None:
    """The back-off of each node type; of several the longest.

    (1) a block pends for a reason that never clears: no request during ``node_type_retry_s``, unless one starts;
    (2) ``early_deaths_max`` blocks in a row died early: no request during ``node_type_retry_s`` after the last one;
    (3) the scheduler refused the last blocks: a back-off, doubled with each in a row; it may recover at any time.
    """
    for kind in tx.policy.node_types:
        blocks = [block for block in tx.blocks.values() if block.type == kind.name]
        after = tx.reset_at.rows.get(kind.name, 0.0)
        found = (_stuck(tx, kind, blocks), _dying(tx, blocks, after), _refused(tx.policy, blocks, after))
        worst = max((one for one in found if one is not None), key=lambda one: one.retry_at, default=None)
        if worst is None:
            tx.backoffs.drop(kind.name)
        elif tx.backoffs.rows.get(kind.name) != worst:
            tx.backoffs.put(kind.name, worst)


def _stuck(tx: Transaction, kind: NodeTypeSpec, blocks: Sequence[SeenBlock]) -> NodeTypeBackoff | None:
    known = tx.backoffs.rows.get(kind.name)
    if known is not None and known.cause is not Cause.UNSCHEDULABLE:
        known = None
    for block in blocks:
        if known is not None and block.phase is BlockPhase.RUNNING and _began(block) > known.since:
            known = None
    if known is not None and tx.now < known.retry_at:
        return known
    for block in blocks:
        if block.phase is BlockPhase.PENDING and block.never_clears:
            retry_at = tx.now + tx.policy.node_type_retry_s
            return NodeTypeBackoff(Cause.UNSCHEDULABLE, 1, block.name, block.reason or "", tx.now, retry_at)
    return known


def _dying(tx: Transaction, blocks: Sequence[SeenBlock], after: float) -> NodeTypeBackoff | None:
    """From the latest block backwards: (1) one that lives, or lived long enough, ends the row; (2) one that never ran
    is skipped, as is one that was cancelled before its node joined; (3) one that died early counts."""
    if not any(block.phase in _DIED for block in blocks):
        return None
    living = {node.block for node in tx.nodes.rows.values()}
    row: list[SeenBlock] = []
    for block in sorted(blocks, key=lambda block: (_began(block), block.name), reverse=True):
        early = _died_early(tx, block)
        if block.name in living or (block.name in tx.joined_blocks and not early):  # (1)
            break
        if block.job is None or not block.phase.ended or block.phase is BlockPhase.CANCELLED:  # (2)
            continue
        if not early or _ended(block) <= after:
            break
        row.append(block)  # (3)
    if len(row) < tx.policy.early_deaths_max:
        return None
    retry_at = max(map(_ended, row)) + tx.policy.node_type_retry_s
    return NodeTypeBackoff(
        Cause.CRASH_LOOP, len(row), row[0].name, row[0].reason or "no reason given", _ended(row[0]), retry_at
    )


def _died_early(tx: Transaction, block: SeenBlock) -> bool:
    """It failed or was lost within ``lived_s`` of its start, or before its node joined, where this would be known."""
    if block.phase not in _DIED or block.job is None:
        return False
    if block.starts_at is not None and _ended(block) <= block.starts_at + tx.policy.lived_s:
        return True
    return _ended(block) >= tx.started_at and block.name not in tx.joined_blocks


def _refused(policy: Policy, blocks: Sequence[SeenBlock], after: float) -> NodeTypeBackoff | None:
    """From the latest request backwards: blocks without a job, until one that had one."""
    if not any(block.job is None for block in blocks):
        return None
    row: list[SeenBlock] = []
    for block in sorted(blocks, key=lambda block: (block.asked_at, block.name), reverse=True):
        if block.job is not None or (block.phase in _DIED and _ended(block) <= after):
            break
        if block.phase in _DIED:
            row.append(block)
    if not row:
        return None
    last = max(map(_ended, row))
    delay_s = min(policy.submit_retry_max_s, policy.submit_retry_first_s * 2.0 ** min(len(row) - 1, 30))
    return NodeTypeBackoff(
        Cause.SUBMIT_REJECTED, len(row), row[0].name, row[0].reason or "no reason given", last, last + delay_s
    )


def _began(block: SeenBlock) -> float:
    return block.asked_at if block.starts_at is None else block.starts_at


def _ended(block: SeenBlock) -> float:
    return block.asked_at if block.ended_at is None else block.ended_at
