"""How many nodes: one more for a wanted model that fits nowhere, ``min_nodes`` always; ``shrinking`` gives them back.

Up and down have thresholds of their own, and no clock between them is needed so that they do not chase each other: a
node is given back only when nothing on it has been used for minutes and no wanted model could use it, one is asked for
only when a model has found no room, by eviction neither, and what is on its way could not hold it.
"""

from __future__ import annotations

from serve.core.change import Change
from serve.core.effects import CreateAgent
from serve.core.eviction import Need, Room
from serve.core.fleet import Node, NodeKind, NodePhase
from serve.core.placement import holds, need_of
from serve.core.shrinking import give_back, shrink
from serve.core.troubles import may_ask, withdrawn


def grow_and_shrink(change: Change, unplaced: tuple[str, ...]) -> None:
    """Ask for nodes and give nodes back; ``unplaced``: wanted models without room, in order.

    (1) a node that leaves and is empty goes, and a pending one of a kind that cannot be had;
    (2) a pending node that could hold the model is on its way: it is credited;
    (3) the model has not waited for ``growth_after_s``, and a node here could hold it when something ends: not yet;
    (4) the smallest kind that could hold it, is below ``max_nodes`` and may be asked for: ask for one (for a model that
        no client waits for only if no node is pending);
    (5) ``min_nodes`` of each kind;
    (6) what is not needed is given back, pending nodes first.
    """
    pending: dict[str, Room] = {}
    count: dict[str, int] = {}
    staying: dict[str, int] = {}
    kinds = {kind.name: kind for kind in change.policy.kinds}
    useless = withdrawn(change)
    for node in list(change.nodes.rows.values()):
        left = node.drain_asked and not node.engines and node.phase in (NodePhase.LEAVING, NodePhase.PENDING)
        if left or node.id in useless:  # (1)
            give_back(change, node)
            continue
        count[node.type] = count.get(node.type, 0) + 1
        if node.drain_asked:
            continue
        staying[node.type] = staying.get(node.type, 0) + 1
        if node.phase is NodePhase.PENDING and node.type in kinds:
            pending[node.id] = Room(kinds[node.type].host_mib, kinds[node.type].gpu_mib)
    needed: set[str] = set()
    for name in unplaced:
        need = need_of(change.models[name])
        credit = next((node for node in sorted(pending) if pending[node].devices(need) is not None), None)
        if credit is None:
            kind = _smallest(change, need, count)
            too_many = bool(pending) and change.unattended(name)
            if kind is not None and not too_many and _pressing(change, name, need):  # (3), (4)
                credit = _ask(change, kind, count, staying)
                pending[credit] = Room(kind.host_mib, kind.gpu_mib)
        if credit is not None:  # (2)
            devices = pending[credit].devices(need)
            assert devices is not None, "it was chosen because it fits"
            pending[credit] = pending[credit].add(devices, -need.mib)
            needed.add(credit)
    for kind in change.policy.kinds:  # (5)
        while staying.get(kind.name, 0) < kind.min_nodes and _may_have(change, kind, count):
            needed.add(_ask(change, kind, count, staying))
    spare = {name: many - (kinds[name].min_nodes if name in kinds else 0) for name, many in staying.items()}
    shrink(change, frozenset(pending.keys() - needed), spare)  # (6)


def _ask(change: Change, kind: NodeKind, *counts: dict[str, int]) -> str:
    node = Node(change.name(kind.name, change.next_serial()), kind.name, NodePhase.PENDING, since=change.now)
    change.nodes.put(node.id, node)
    for many in counts:
        many[kind.name] = many.get(kind.name, 0) + 1
    change.emit(CreateAgent(node.id, node.type))
    return node.id


def _may_have(change: Change, kind: NodeKind, count: dict[str, int]) -> bool:
    return count.get(kind.name, 0) < kind.max_nodes and may_ask(change, kind)


def _smallest(change: Change, need: Need, count: dict[str, int]) -> NodeKind | None:
    able = [kind for kind in change.policy.kinds if holds(kind, need) and _may_have(change, kind, count)]
    return min(able, key=lambda kind: (len(kind.gpu_mib), sum(kind.gpu_mib), kind.host_mib, kind.name), default=None)


def _pressing(change: Change, model: str, need: Need) -> bool:
    tickets = change.queues.rows.get(model)
    if tickets is None or change.now >= change.waiters.rows[tickets[0]].since + change.policy.growth_after_s:
        return True
    return not any(node.phase is NodePhase.UP and holds(node, need) for node in change.nodes.rows.values())
