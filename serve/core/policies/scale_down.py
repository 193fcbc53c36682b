"""Scale-down: which nodes are released: unneeded ones, the cheapest to lose first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from serve.core.engine_use import idle
from serve.core.looking import not_just_busy, not_just_serving
from serve.core.room import holds, need_of
from serve.core.state import Engine, EngineState, Node, NodePhase, used_at
from serve.core.table import seen
from serve.core.transaction import Transaction
from serve.core.transitions import drain_node, release_node


def shrink(tx: Transaction, surplus: frozenset[str], spare: Mapping[str, int]) -> None:
    """Release nodes that are not needed. ``surplus``: pending nodes without a use; ``spare``: nodes of each type above
    its ``min_nodes``.

    (1) A pending node is surplus while no model needs it.
    (2) A node that is due has been empty, but for engines asleep, for ``block_idle_s``, or all of its engines unused
        for ``block_unused_s``; the last one here only after ``last_block_idle_s``; none that a wanted model could use.
    (3) Surplus pending nodes go first: after ``pending_idle_s``, and at once where a node of their type is due.
    (4) Then those that are due: empty ones first, then the cheapest to lose; engines leave behind drained routes.
    """
    spare = dict(spare)
    for node in [node for node in seen(tx.nodes.rows, not_just_serving) if node.phase is NodePhase.PENDING]:
        if (node.id in surplus) != (node.idle_since is not None):  # (1)
            tx.nodes.put(node.id, replace(node, idle_since=tx.now if node.id in surplus else None))
    due = _due(tx)  # (2)
    pressed = {node.type for node in due}
    for name in sorted(surplus):  # (3)
        node = tx.nodes.rows[name]
        since = tx.now if node.idle_since is None else node.idle_since
        ripe = node.type in pressed or tx.now >= since + tx.policy.pending_idle_s
        if ripe and spare.get(node.type, 0) > 0:
            spare[node.type] -= 1
            release_node(tx, node)
    for node in due:  # (4)
        if spare.get(node.type, 0) <= 0:
            continue
        spare[node.type] -= 1
        if node.engines:
            drain_node(tx, node)
        else:
            release_node(tx, node)


def _due(tx: Transaction) -> list[Node]:
    """Nodes to release, the first to go first."""
    policy, now = tx.policy, tx.now
    ripe: list[tuple[float, float, Node]] = []
    nodes = tx.nodes.rows
    unused = [one for one in seen(tx.engines.rows, not_just_busy) if _long_unused(tx, one)]
    on = {part.node for one in unused for part in one.parts if nodes[part.node].engines[0] == one.id}
    empty = [node for node in seen(nodes, not_just_serving) if not node.engines]
    for node in (*empty, *(nodes[name] for name in on)):
        if node.drain_asked or node.phase is not NodePhase.UP:
            continue
        patience = policy.block_idle_s if _asleep(tx, node) else policy.block_unused_s
        if patience is None or (since := _unused_since(tx, node)) is None:
            continue
        if now >= since + patience:
            ripe.append((reload_cost(tx, node), since, node))
    if not ripe:
        return []
    ripe.sort(key=lambda entry: (*entry[:2], entry[2].id))
    staying = [node for node in tx.nodes.rows.values() if not node.drain_asked]
    here = sum(node.phase in (NodePhase.UP, NodePhase.ORPHANED) for node in staying)
    due = []
    for _, since, node in ripe:
        if here == 1 and now < since + policy.last_block_idle_s:
            continue
        if not _could_host_demand(tx, node):
            due.append(node)
            here -= 1
    return due


def _asleep(tx: Transaction, node: Node) -> bool:
    """No engine on it is awake."""
    return all(tx.engines.rows[name].state is EngineState.ASLEEP for name in node.engines)


def _long_unused(tx: Transaction, engine: Engine) -> bool:
    """Else its node was used too recently."""
    if engine.state is EngineState.ASLEEP:
        return True
    unused_s = tx.policy.block_unused_s
    return unused_s is not None and not engine.in_flight and tx.now >= engine.last_used + unused_s


def _unused_since(tx: Transaction, node: Node) -> float | None:
    """Since when nothing on it has been used; ``None``: it is in use, or may be at once, or its agent is away."""
    if node.phase is not NodePhase.UP:
        return None
    if not node.engines:
        return node.idle_since
    asleep = _asleep(tx, node)
    since = node.idle_since or 0.0 if asleep else 0.0
    for name in node.engines:
        engine = tx.engines.rows[name]
        if engine.state is EngineState.ASLEEP and not tx.wanted(engine.model):
            since = max(since, engine.since if asleep else used_at(engine))
            continue
        if engine.in_flight or not idle(tx, engine) or tx.wanted(engine.model):
            return None
        since = max(since, used_at(engine), engine.granted_at)
    return since


def reload_cost(tx: Transaction, node: Node) -> float:
    """The cost of losing it: the seconds to load its models again, weighted by how recently they were used.

    A model unused for an hour is half as likely to be asked for in the next minute as one unused for half an hour.
    """
    rows, policy = tx.engines.rows, tx.policy
    return sum(
        tx.load_s.rows.get(rows[name].model, policy.load_guess_s) / max(1.0, tx.now - used_at(rows[name]))
        for name in node.engines
    )


def _could_host_demand(tx: Transaction, node: Node) -> bool:
    """A wanted model without an engine (it may be backing off after a failure) would fit on it."""
    wanted = (*tx.queues.rows, *tx.pinned, *tx.requested_until.rows)
    return any(
        holds(node, need_of(tx.models[model])) and tx.deficit(model) > 0 for model in wanted if model in tx.models
    )
