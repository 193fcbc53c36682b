"""Which node types can be asked for, and when waiting for one makes no sense."""

from __future__ import annotations

from collections.abc import Mapping

from gateway_plugin.catalog import Model
from gateway_plugin.errors import GatewayError, NoBlocks, NoRoom
from gateway_plugin.phases import BlockPhase
from serve.core.policy import NodeKind
from serve.core.room import Need, could_ever_hold, holds, need_of
from serve.core.state import Cause, Node, NodePhase, Trouble
from serve.core.transaction import Transaction


def may_ask(tx: Transaction, kind: NodeKind) -> bool:
    """(1) not before a back-off is over; (2) then one node at a time, until its trouble is gone."""
    failure = tx.kind_failures.rows.get(kind.name)
    if failure is not None and tx.now < failure.retry_at:  # (1)
        return False
    trouble = tx.troubles.rows.get(kind.name)
    if trouble is None:
        return True
    if tx.now < trouble.retry_at:  # (1)
        return False
    nodes = tx.nodes.rows.values()
    return not any(node.type == kind.name and node.phase is NodePhase.PENDING for node in nodes)  # (2)


def words(kind: str, trouble: Trouble) -> str:
    """One sentence for people, without its full stop: which kind, which block, and what was said."""
    if trouble.cause is Cause.STUCK:
        return f"Blocks of type '{kind}' can never start: {trouble.block} pends with '{trouble.reason}'"
    what = "ended early" if trouble.cause is Cause.DYING else "could not be submitted"
    which = "the last block" if trouble.count == 1 else f"the last {trouble.count} blocks"
    said = trouble.reason.rstrip(".")
    return f"Of type '{kind}' {which} {what}; {trouble.block} with: {said}"


def withdrawn(tx: Transaction) -> frozenset[str]:
    """Pending nodes whose agents are taken back: those of a kind in trouble, the youngest first, as many as have no
    block on its way. A block that runs and has not joined is; one in the queue is where the trouble lies elsewhere.
    """
    found: list[str] = []
    for name, trouble in tx.troubles.rows.items():
        if tx.now >= trouble.retry_at:
            continue
        pending = [n for n in tx.nodes.rows.values() if n.type == name and n.phase is NodePhase.PENDING]
        if pending:
            pending.sort(key=lambda node: (node.since, node.id))
            found += [node.id for node in pending[_coming(tx, name, trouble) :]]
    return frozenset(found)


def _coming(tx: Transaction, kind: str, trouble: Trouble) -> int:
    joined = {node.block for node in tx.nodes.rows.values()}
    many = 0
    for block in tx.blocks.values():
        if block.type == kind and block.name not in joined:
            queued = block.phase.queued and trouble.cause is not Cause.DYING
            many += block.phase is BlockPhase.RUNNING or (queued and not block.never_clears)
    return many


def why_hopeless(tx: Transaction, model: Model) -> GatewayError | None:
    """Why waiting for a node that can hold ``model`` makes no sense; ``None``: it does."""
    if not could_ever_hold(tx.policy.kinds, tx.nodes.rows, need_of(model)):
        return _no_room(tx, model)
    troubled = _only_in_trouble(tx, need_of(model))
    return _no_blocks(tx, model, troubled) if troubled else None


def _no_room(tx: Transaction, model: Model) -> NoRoom:
    need = f"{model.gpus} GPUs with {model.memory_mib} MiB each" if model.gpus else f"{model.memory_mib} MiB"
    things: tuple[NodeKind | Node, ...] = (*tx.policy.kinds, *tx.nodes.rows.values())
    most = max((max(thing.gpu_mib, default=0) if model.gpus else thing.host_mib for thing in things), default=0)
    where = f"at most {max((len(t.gpu_mib) for t in things), default=0)} GPUs with {most}" if model.gpus else f"{most}"
    return NoRoom(
        f"The model '{model.name}' needs {need}; a node of this site has {where} MiB. "
        "Give it less memory in the catalog, or the site larger nodes.",
        retry_after_s=300.0,
        state="cold",
    )


def _only_in_trouble(tx: Transaction, need: Need) -> dict[str, Trouble]:
    """The kinds that could hold ``need``, where no node here could and all are in lasting trouble; else none."""
    if not any(trouble.lasting for trouble in tx.troubles.rows.values()):
        return {}
    able = {kind.name: kind for kind in tx.policy.kinds if kind.max_nodes > 0 and holds(kind, need)}
    useless = withdrawn(tx)
    for node in tx.nodes.rows.values():
        coming = node.phase is NodePhase.PENDING and node.type in able and node.id not in useless
        if coming or holds(node, need):
            return {}
    found = {}
    for name in able:
        trouble = tx.troubles.rows.get(name)
        if trouble is None or not trouble.lasting or tx.now >= trouble.retry_at:
            return {}
        found[name] = trouble
    return found


def _no_blocks(tx: Transaction, model: Model, troubled: Mapping[str, Trouble]) -> NoBlocks:
    wait_s = max(1.0, min(trouble.retry_at for trouble in troubled.values()) - tx.now)
    said = " ".join(f"{words(kind, trouble)}." for kind, trouble in troubled.items())
    kinds = " or ".join(f"'gateway blocks retry {kind}'" for kind in troubled)
    return NoBlocks(
        f"The model '{model.name}' fits only on blocks that cannot be had. {said} An administrator who has put that "
        f"right runs {kinds}; by itself it is tried again in {wait_s:.0f} s.",
        retry_after_s=wait_s,
        state="cold",
    )
