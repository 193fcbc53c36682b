"""How many nodes: one more for a wanted model that fits nowhere, ``min_nodes`` always; see ``scale_down`` for release.

Up and down have thresholds of their own, so no timer between them is needed against oscillation: a node is released
only when nothing on it has been used for minutes and no wanted model could use it, one is requested only when a model
has found no room, by eviction neither, and no pending node could hold it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from serve.core.effects import CreateAgent
from serve.core.engine_use import staying
from serve.core.looking import by_type, not_just_serving
from serve.core.policy import NodeTypeSpec
from serve.core.room import Need, Room, holds, need_of
from serve.core.state import Node, NodePhase
from serve.core.supply import agents_to_withdraw, may_ask
from serve.core.table import seen
from serve.core.transaction import Transaction
from serve.core.transitions import release_node


def grow(tx: Transaction, unplaced: tuple[str, ...]) -> tuple[frozenset[str], Mapping[str, int]]:
    """Request nodes. ``unplaced``: wanted models without room, in order. Returns the pending nodes without a use, and
    how many nodes of each type there are above its ``min_nodes``.

    (1) a node that leaves and is empty is released, and a pending one of a type that backs off;
    (2) a pending node that could hold the model is on its way: it is credited;
    (3) the model has not waited for ``growth_after_s``, and a node here could hold it when something ends: not yet;
    (4) models that have an engine come after all others, and only once they have lacked another one for
        ``replica_growth_after_s``;
    (5) the smallest type that could hold it, is below ``max_nodes`` and may be requested: request one (for a model
        without a waiting client only if no node is pending);
    (6) ``min_nodes`` of each type;
    (7) what is not needed may be released.
    """
    pending: dict[str, Room] = {}
    count = Counter(seen(tx.nodes.rows, by_type))
    stay = Counter(count)
    node_types = {kind.name: kind for kind in tx.policy.node_types}
    useless = agents_to_withdraw(tx)
    found = seen(tx.nodes.rows, not_just_serving)
    for node in [node for node in found if node.drain_asked or node.phase is NodePhase.PENDING]:
        left = node.drain_asked and not node.engines and node.phase in (NodePhase.LEAVING, NodePhase.PENDING)
        if left or node.id in useless:  # (1)
            release_node(tx, node)
            count[node.type] -= 1
            stay[node.type] -= 1
        elif node.drain_asked:
            stay[node.type] -= 1
        elif node.type in node_types:
            pending[node.id] = Room(node_types[node.type].host_mib, node_types[node.type].gpu_mib)
    needed: set[str] = set()
    for name in sorted(unplaced, key=lambda name: bool(staying(tx, name))):  # (4)
        need = need_of(tx.models[name])
        credit = next((node for node in sorted(pending) if pending[node].devices(need) is not None), None)
        if credit is None:
            kind = _smallest(tx, need, count)
            too_many = bool(pending) and tx.unattended(name)
            if kind is not None and not too_many and _pressing(tx, name, need):  # (3), (4), (5)
                credit = _ask(tx, kind, count, stay)
                pending[credit] = Room(kind.host_mib, kind.gpu_mib)
        if credit is not None:  # (2)
            devices = pending[credit].devices(need)
            assert devices is not None, "it was chosen because it fits"
            pending[credit] = pending[credit].add(devices, -need.mib)
            needed.add(credit)
    for kind in tx.policy.node_types:  # (6)
        while stay[kind.name] < kind.min_nodes and _may_have(tx, kind, count):
            needed.add(_ask(tx, kind, count, stay))
    spare = {name: many - (node_types[name].min_nodes if name in node_types else 0) for name, many in stay.items()}
    return frozenset(pending.keys() - needed), spare  # (7)


def _ask(tx: Transaction, kind: NodeTypeSpec, *counts: Counter[str]) -> str:
    node = Node(tx.name(kind.name, tx.next_serial()), kind.name, NodePhase.PENDING, since=tx.now)
    tx.nodes.put(node.id, node)
    for many in counts:
        many[kind.name] += 1
    tx.emit(CreateAgent(node.id, node.type))
    return node.id


def _may_have(tx: Transaction, kind: NodeTypeSpec, count: Mapping[str, int]) -> bool:
    return count.get(kind.name, 0) < kind.max_nodes and may_ask(tx, kind)


def _smallest(tx: Transaction, need: Need, count: Mapping[str, int]) -> NodeTypeSpec | None:
    able = [kind for kind in tx.policy.node_types if holds(kind, need) and _may_have(tx, kind, count)]
    return min(able, key=lambda kind: (len(kind.gpu_mib), sum(kind.gpu_mib), kind.host_mib, kind.name), default=None)


def _pressing(tx: Transaction, model: str, need: Need) -> bool:
    spread = tx.spreads.rows.get(model)
    if spread is not None and staying(tx, model):
        return tx.now >= spread.set_at + tx.policy.replica_growth_after_s
    tickets = tx.queues.rows.get(model)
    if tickets is None or tx.now >= tx.waiters.rows[tickets[0]].since + tx.policy.growth_after_s:
        return True
    return not any(node.phase is NodePhase.UP and holds(node, need) for node in tx.nodes.rows.values())
