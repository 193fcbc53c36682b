"""Kinds of nodes that cannot be had: what the ledger says of their blocks, when they are asked for again.

Everything is read off the ledger afresh, so that a controller that was restarted knows it too. This is the one place
that decides when a kind is asked for again; ``gateway_plugin.blocks.pool`` only keeps a floor below it.
"""

from __future__ import annotations

from collections.abc import Iterable

from serve.core.change import Change
from serve.core.events import KindRetryAsked, SeenBlock
from serve.core.fleet import Cause, NodeKind, NodePhase, Policy, Trouble
from serve.core.reasons import never_clears

_DIED = frozenset({"failed", "lost"})
_ENDED = _DIED | {"completed", "cancelled", "expired"}


def judge(change: Change) -> None:
    """What troubles each kind; the one that lasts longest, where there are several.

    (1) a block pends for a reason that never clears: not asked for during ``kind_retry_s``, unless one starts;
    (2) ``early_deaths_max`` blocks in a row died early: not asked for during ``kind_retry_s`` after the last one;
    (3) the scheduler refused the last blocks: a back-off, doubled with each in a row; it may come back at any time.
    """
    for kind in change.policy.kinds:
        blocks = [block for block in change.blocks.values() if block.type == kind.name]
        after = change.forgiven.rows.get(kind.name, 0.0)
        found = (_stuck(change, kind, blocks), _dying(change, blocks, after), _refused(change.policy, blocks, after))
        worst = max((one for one in found if one is not None), key=lambda one: one.retry_at, default=None)
        if worst is None:
            change.troubles.drop(kind.name)
        elif change.troubles.rows.get(kind.name) != worst:
            change.troubles.put(kind.name, worst)


def _stuck(change: Change, kind: NodeKind, blocks: Iterable[SeenBlock]) -> Trouble | None:
    known = change.troubles.rows.get(kind.name)
    if known is not None and known.cause is not Cause.STUCK:
        known = None
    for block in blocks:
        if known is not None and block.phase == "running" and _began(block) > known.since:
            known = None
    if known is not None and change.now < known.retry_at:
        return known
    for block in blocks:
        if block.phase == "pending" and never_clears(block.reason):
            retry_at = change.now + change.policy.kind_retry_s
            return Trouble(Cause.STUCK, 1, block.name, block.reason or "", change.now, retry_at)
    return known


def _dying(change: Change, blocks: Iterable[SeenBlock], after: float) -> Trouble | None:
    """From the block that began last backwards: (1) one that lives, or did, ends the row; (2) one that never ran says
    nothing, nor does one that was cancelled before its node joined; (3) one that died early counts."""
    living = {node.block for node in change.nodes.rows.values()}
    row: list[SeenBlock] = []
    for block in sorted(blocks, key=lambda block: (_began(block), block.name), reverse=True):
        early = _died_early(change, block)
        if block.name in living or (block.name in change.joined_blocks and not early):  # (1)
            break
        if block.job is None or block.phase not in _ENDED or block.phase == "cancelled":  # (2)
            continue
        if not early or _ended(block) <= after:
            break
        row.append(block)  # (3)
    if len(row) < change.policy.early_deaths_max:
        return None
    retry_at = max(map(_ended, row)) + change.policy.kind_retry_s
    return Trouble(Cause.DYING, len(row), row[0].name, row[0].reason or "no reason given", _ended(row[0]), retry_at)


def _died_early(change: Change, block: SeenBlock) -> bool:
    """It failed or was lost within ``lived_s`` of its start, or before its node joined, where this would be known."""
    if block.phase not in _DIED or block.job is None:
        return False
    if block.starts_at is not None and _ended(block) <= block.starts_at + change.policy.lived_s:
        return True
    return _ended(block) >= change.started_at and block.name not in change.joined_blocks


def _refused(policy: Policy, blocks: Iterable[SeenBlock], after: float) -> Trouble | None:
    """From the block that was asked for last backwards: those without a job, until one that had one."""
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
    return Trouble(Cause.REFUSED, len(row), row[0].name, row[0].reason or "no reason given", last, last + delay_s)


def _began(block: SeenBlock) -> float:
    return block.asked_at if block.starts_at is None else block.starts_at


def _ended(block: SeenBlock) -> float:
    return block.asked_at if block.ended_at is None else block.ended_at


def retry_asked(change: Change, event: KindRetryAsked) -> None:
    """``gateway blocks retry``: what its blocks did until now is forgiven."""
    change.forgiven.put(event.type, change.now)
    change.troubles.drop(event.type)
    change.kind_failures.drop(event.type)


def may_ask(change: Change, kind: NodeKind) -> bool:
    """(1) not before a back-off is over; (2) then one node at a time, until its trouble is gone."""
    failure = change.kind_failures.rows.get(kind.name)
    if failure is not None and change.now < failure.retry_at:  # (1)
        return False
    trouble = change.troubles.rows.get(kind.name)
    if trouble is None:
        return True
    if change.now < trouble.retry_at:  # (1)
        return False
    nodes = change.nodes.rows.values()
    return not any(node.type == kind.name and node.phase is NodePhase.PENDING for node in nodes)  # (2)


def words(kind: str, trouble: Trouble) -> str:
    """One sentence for people, without its full stop: which kind, which block, and what was said."""
    if trouble.cause is Cause.STUCK:
        return f"Blocks of type '{kind}' can never start: {trouble.block} pends with '{trouble.reason}'"
    what = "ended early" if trouble.cause is Cause.DYING else "could not be submitted"
    which = "the last block" if trouble.count == 1 else f"the last {trouble.count} blocks"
    said = trouble.reason.rstrip(".")
    return f"Of type '{kind}' {which} {what}; {trouble.block} with: {said}"


def withdrawn(change: Change) -> frozenset[str]:
    """Pending nodes whose agents are taken back: those of a kind in trouble, the youngest first, as many as have no
    block on its way. A block that runs and has not joined is; one in the queue is where the trouble lies elsewhere.
    """
    found: list[str] = []
    for name, trouble in change.troubles.rows.items():
        if change.now >= trouble.retry_at:
            continue
        pending = [n for n in change.nodes.rows.values() if n.type == name and n.phase is NodePhase.PENDING]
        if pending:
            pending.sort(key=lambda node: (node.since, node.id))
            found += [node.id for node in pending[_coming(change, name, trouble) :]]
    return frozenset(found)


def _coming(change: Change, kind: str, trouble: Trouble) -> int:
    joined = {node.block for node in change.nodes.rows.values()}
    many = 0
    for block in change.blocks.values():
        if block.type == kind and block.name not in joined:
            queued = block.phase in ("submitting", "pending") and trouble.cause is not Cause.DYING
            many += block.phase == "running" or (queued and not never_clears(block.reason))
    return many
