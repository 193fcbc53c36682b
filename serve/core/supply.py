"""Which node types can be requested, and when waiting for one is hopeless."""

from __future__ import annotations

from collections.abc import Mapping

from gateway_plugin.catalog import Model
from gateway_plugin.errors import GatewayError, ModelUnavailable, NoBlocks, NoRoom
from gateway_plugin.phases import BlockPhase
from serve.core.policy import NodeTypeSpec
from serve.core.room import Need, could_ever_hold, holds, need_of
from serve.core.state import Cause, Node, NodePhase, NodeTypeBackoff, Weights
from serve.core.transaction import Transaction

_WEIGHTS_S = 60.0
"""Retry-After of a model without weights, which wait for an administrator or for a back-off to end."""


def may_ask(tx: Transaction, kind: NodeTypeSpec) -> bool:
    """(1) not before a back-off is over; (2) then one node at a time, until the back-off is cleared."""
    failure = tx.agent_failures.rows.get(kind.name)
    if failure is not None and tx.now < failure.retry_at:  # (1)
        return False
    backoff = tx.backoffs.rows.get(kind.name)
    if backoff is None:
        return True
    if tx.now < backoff.retry_at:  # (1)
        return False
    nodes = tx.nodes.rows.values()
    return not any(node.type == kind.name and node.phase is NodePhase.PENDING for node in nodes)  # (2)


def describe(kind: str, backoff: NodeTypeBackoff) -> str:
    """One sentence for users, without its full stop: the node type, the block, and its reason."""
    if backoff.cause is Cause.UNSCHEDULABLE:
        return f"Blocks of type '{kind}' can never start: {backoff.block} pends with '{backoff.reason}'"
    what = "ended early" if backoff.cause is Cause.CRASH_LOOP else "could not be submitted"
    which = "the last block" if backoff.count == 1 else f"the last {backoff.count} blocks"
    said = backoff.reason.rstrip(".")
    return f"Of type '{kind}' {which} {what}; {backoff.block} with: {said}"


def agents_to_withdraw(tx: Transaction) -> frozenset[str]:
    """Pending nodes whose agents are withdrawn: those of a type that backs off, the youngest first, as many as have no
    block on its way: one that runs and has not joined, or one in the queue unless the queue is the reason.
    """
    found: list[str] = []
    for name, backoff in tx.backoffs.rows.items():
        if tx.now >= backoff.retry_at:
            continue
        pending = [n for n in tx.nodes.rows.values() if n.type == name and n.phase is NodePhase.PENDING]
        if pending:
            pending.sort(key=lambda node: (node.since, node.id))
            found += [node.id for node in pending[_coming(tx, name, backoff) :]]
    return frozenset(found)


def _coming(tx: Transaction, kind: str, backoff: NodeTypeBackoff) -> int:
    joined = {node.block for node in tx.nodes.rows.values()}
    many = 0
    for block in tx.blocks.values():
        if block.type == kind and block.name not in joined:
            queued = block.phase.queued and backoff.cause is not Cause.CRASH_LOOP
            many += block.phase is BlockPhase.RUNNING or (queued and not block.never_clears)
    return many


def why_hopeless(tx: Transaction, model: Model) -> GatewayError | None:
    """Why waiting for a node that can hold ``model`` is hopeless; ``None``: it is not."""
    if not could_ever_hold(tx.policy.node_types, tx.nodes.rows, need_of(model)):
        return _no_room(tx, model)
    backed_off = _only_backed_off(tx, need_of(model))
    return _no_blocks(tx, model, backed_off) if backed_off else None


def without_weights(model: str, weights: Weights) -> ModelUnavailable:
    """The refusal of a model whose weights are not on disk, and that nothing fetches."""
    return ModelUnavailable(
        f"The model '{model}' cannot be loaded: {weights.reason.rstrip('.')}.",
        retry_after_s=_WEIGHTS_S,
        state="failed",
        eta_s=None,
        detail=weights.detail,
    )


def _no_room(tx: Transaction, model: Model) -> NoRoom:
    need = f"{model.gpus} GPUs with {model.memory_mib} MiB each" if model.gpus else f"{model.memory_mib} MiB"
    things: tuple[NodeTypeSpec | Node, ...] = (*tx.policy.node_types, *tx.nodes.rows.values())
    most = max((max(thing.gpu_mib, default=0) if model.gpus else thing.host_mib for thing in things), default=0)
    where = f"at most {max((len(t.gpu_mib) for t in things), default=0)} GPUs with {most}" if model.gpus else f"{most}"
    return NoRoom(
        f"The model '{model.name}' needs {need}; a node of this site has {where} MiB. "
        "Give it less memory in the catalog, or the site larger nodes.",
        retry_after_s=300.0,
        state="cold",
    )


def _only_backed_off(tx: Transaction, need: Need) -> dict[str, NodeTypeBackoff]:
    """The types that could hold ``need``, where no node here could and all back off for long; else none."""
    if not any(backoff.lasting for backoff in tx.backoffs.rows.values()):
        return {}
    able = {kind.name: kind for kind in tx.policy.node_types if kind.max_nodes > 0 and holds(kind, need)}
    useless = agents_to_withdraw(tx)
    for node in tx.nodes.rows.values():
        coming = node.phase is NodePhase.PENDING and node.type in able and node.id not in useless
        if coming or holds(node, need):
            return {}
    found = {}
    for name in able:
        backoff = tx.backoffs.rows.get(name)
        if backoff is None or not backoff.lasting or tx.now >= backoff.retry_at:
            return {}
        found[name] = backoff
    return found


def _no_blocks(tx: Transaction, model: Model, backed_off: Mapping[str, NodeTypeBackoff]) -> NoBlocks:
    wait_s = max(1.0, min(backoff.retry_at for backoff in backed_off.values()) - tx.now)
    said = " ".join(f"{describe(kind, backoff)}." for kind, backoff in backed_off.items())
    commands = " or ".join(f"'gateway blocks retry {kind}'" for kind in backed_off)
    return NoBlocks(
        f"The model '{model.name}' fits only on blocks that are not available. {said} After a repair an administrator "
        f"runs {commands}; otherwise the next try is in {wait_s:.0f} s.",
        retry_after_s=wait_s,
        state="cold",
    )
