"""How many nodes: one more for a wanted model that fits nowhere, one less when it has been empty and unneeded."""

from __future__ import annotations

from serve.core.change import Change
from serve.core.effects import CreateAgent
from serve.core.eviction import Need, Room
from serve.core.fleet import Node, NodeKind, NodePhase
from serve.core.placement import holds, need_of
from serve.core.shrinking import give_back, shrink


def grow_and_shrink(change: Change, unplaced: tuple[str, ...]) -> None:
    """Ask for nodes and give nodes back; ``unplaced``: wanted models without room, in order.

    (1) a node that leaves and is empty goes;
    (2) a pending node that could hold the model is on its way: it is credited;
    (3) the model has not waited for ``growth_after_s``, and a node here could hold it when something ends: not yet;
    (4) the smallest kind that could hold it and is below ``max_nodes``: ask for one (not after a failure's back-off);
    (5) ``min_nodes`` of each kind;
    (6) a pending node that nobody has needed for ``pending_idle_s`` goes;
    (7) a node empty for ``block_idle_s`` goes, if no wanted model could use it.
    """
    pending: dict[str, Room] = {}
    count: dict[str, int] = {}
    staying: dict[str, int] = {}
    kinds = {kind.name: kind for kind in change.policy.kinds}
    for node in list(change.nodes.rows.values()):
        if node.drain_asked and not node.engines and node.phase in (NodePhase.LEAVING, NodePhase.PENDING):  # (1)
            give_back(change, node)
            continue
        count[node.type] = count.get(node.type, 0) + 1
        if node.drain_asked:
            continue
        staying[node.type] = staying.get(node.type, 0) + 1
        if node.phase is NodePhase.PENDING:
            if node.type in kinds:
                pending[node.id] = Room(kinds[node.type].host_mib, kinds[node.type].gpu_mib)
    asked: set[str] = set()
    needed: set[str] = set()
    for name in unplaced:
        need = need_of(change.models[name])
        credit = next((node for node in sorted(pending) if pending[node].devices(need) is not None), None)
        if credit is None:
            kind = _smallest(change, need, count)
            if kind is not None and _pressing(change, name, need):  # (3), (4)
                credit = _ask(change, kind, count)
                asked.add(credit)
                pending[credit] = Room(kind.host_mib, kind.gpu_mib)
        if credit is not None:  # (2)
            devices = pending[credit].devices(need)
            if devices is not None:
                pending[credit] = pending[credit].add(devices, -need.mib)
                needed.add(credit)
    for kind in change.policy.kinds:  # (5)
        there = staying.get(kind.name, 0) + sum(change.nodes.rows[node].type == kind.name for node in asked)
        for _ in range(there, kind.min_nodes):
            if count.get(kind.name, 0) < kind.max_nodes and _may_ask(change, kind):
                needed.add(_ask(change, kind, count))
    spare = {name: many - (kinds[name].min_nodes if name in kinds else 0) for name, many in staying.items()}
    shrink(change, frozenset(node for node in pending if node not in needed), spare)


def _ask(change: Change, kind: NodeKind, count: dict[str, int]) -> str:
    node = Node(f"{kind.name}-{change.epoch}-{change.next_serial()}", kind.name, NodePhase.PENDING, since=change.now)
    change.nodes.put(node.id, node)
    count[kind.name] = count.get(kind.name, 0) + 1
    change.emit(CreateAgent(node.id, node.type))
    return node.id


def _may_ask(change: Change, kind: NodeKind) -> bool:
    failure = change.kind_failures.rows.get(kind.name)
    return failure is None or change.now >= failure.retry_at


def _smallest(change: Change, need: Need, count: dict[str, int]) -> NodeKind | None:
    able = [
        kind
        for kind in change.policy.kinds
        if holds(kind, need) and count.get(kind.name, 0) < kind.max_nodes and _may_ask(change, kind)
    ]
    return min(able, key=lambda kind: (len(kind.gpu_mib), sum(kind.gpu_mib), kind.host_mib, kind.name), default=None)


def _pressing(change: Change, model: str, need: Need) -> bool:
    tickets = change.queues.rows.get(model)
    if tickets is None or change.now >= change.waiters.rows[tickets[0]].since + change.policy.growth_after_s:
        return True
    return not any(node.phase is NodePhase.UP and holds(node, need) for node in change.nodes.rows.values())
