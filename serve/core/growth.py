"""How many nodes: one more for a wanted model that fits nowhere, one less when it has been empty and unneeded."""

from __future__ import annotations

from dataclasses import replace

from serve.core.change import Change, live
from serve.core.effects import CreateAgent, KillAgent
from serve.core.eviction import Need, Room
from serve.core.fleet import Node, NodeKind, NodePhase
from serve.core.placement import could_ever_hold, holds, need_of


def grow_and_shrink(change: Change, unplaced: tuple[str, ...]) -> None:
    """Ask for nodes and give nodes back; ``unplaced``: wanted models without room, in order.

    (1) a node that leaves and is empty goes;
    (2) a pending node that could hold the model is on its way: it is credited;
    (3) the model has not waited for ``growth_after_s``, and a node here could hold it when something ends: not yet;
    (4) the smallest kind that could hold it and is below ``max_nodes``: ask for one (not after a failure's back-off);
    (5) ``min_nodes`` of each kind;
    (6) a pending node that nobody has needed for ``abandoned_load_grace_s`` goes;
    (7) a node empty for ``block_idle_s`` goes, if no wanted model could use it.
    """
    pending: dict[str, Room] = {}
    count: dict[str, int] = {}
    for node in list(change.nodes.rows.values()):
        if node.drain_asked and not node.engines and node.phase in (NodePhase.LEAVING, NodePhase.PENDING):  # (1)
            _give_back(change, node)
            continue
        count[node.type] = count.get(node.type, 0) + 1
        if node.phase is NodePhase.PENDING and (kind := _kind(change, node.type)) is not None:
            pending[node.id] = Room(kind.host_mib, kind.gpu_mib)
    needed: set[str] = set()
    for name in unplaced:
        need = need_of(change.models[name])
        credit = next((node for node in sorted(pending) if pending[node].devices(need) is not None), None)
        if credit is None and _pressing(change, name, need):  # (3)
            kind = _smallest(change, need, count)
            if kind is not None:  # (4)
                credit = _ask(change, kind, count)
                pending[credit] = Room(kind.host_mib, kind.gpu_mib)
        if credit is not None:  # (2)
            devices = pending[credit].devices(need)
            if devices is not None:
                pending[credit] = pending[credit].add(devices, -need.mib)
                needed.add(credit)
    for kind in change.policy.kinds:  # (5)
        staying = [n for n in change.nodes.rows.values() if n.type == kind.name and not n.drain_asked]
        for _ in range(len(staying), kind.min_nodes):
            if count.get(kind.name, 0) < kind.max_nodes and _may_ask(change, kind):
                needed.add(_ask(change, kind, count))
    _give_back_unneeded(change, needed)


def _give_back_unneeded(change: Change, needed: set[str]) -> None:
    now, policy = change.now, change.policy
    least = {kind.name: kind.min_nodes for kind in policy.kinds}
    spare: dict[str, int] = {}
    for node in change.nodes.rows.values():
        spare[node.type] = spare.get(node.type, -least.get(node.type, 0)) + (not node.drain_asked)
    due: list[tuple[int, float, Node]] = []
    for node in list(change.nodes.rows.values()):
        if node.phase is NodePhase.PENDING:
            if node.id in needed or spare[node.type] <= 0:
                if node.idle_since is not None:
                    change.nodes.put(node.id, replace(node, idle_since=None))
            elif node.idle_since is None:
                change.nodes.put(node.id, replace(node, idle_since=now))
            elif now >= node.idle_since + policy.abandoned_load_grace_s:
                due.append((0, node.idle_since, node))
        elif (
            node.phase is NodePhase.UP
            and not node.engines
            and node.idle_since is not None
            and now >= node.idle_since + policy.block_idle_s
            and not _of_use(change, node)
        ):
            due.append((1, node.idle_since, node))
    for _, _, node in sorted(due, key=lambda one: (one[0], one[1], one[2].id)):  # (6), (7)
        if spare[node.type] > 0:
            spare[node.type] -= 1
            _give_back(change, node)


def _of_use(change: Change, node: Node) -> bool:
    """A wanted model without an engine (it may be backing off after a failure) would fit on it."""
    wanted = (*change.queues.rows, *change.pinned, *change.wished)
    return any(
        holds(node, need_of(change.models[model])) and not any(map(live, change.engines_of(model)))
        for model in wanted
        if model in change.models
    )


def _give_back(change: Change, node: Node) -> None:
    change.nodes.drop(node.id)
    change.unsettled -= {node.id}
    change.emit(KillAgent(node.id))


def _ask(change: Change, kind: NodeKind, count: dict[str, int]) -> str:
    node = Node(f"{kind.name}-{change.epoch}-{change.next_serial()}", kind.name, NodePhase.PENDING, since=change.now)
    change.nodes.put(node.id, node)
    count[kind.name] = count.get(kind.name, 0) + 1
    change.emit(CreateAgent(node.id, node.type))
    return node.id


def _kind(change: Change, name: str) -> NodeKind | None:
    return next((kind for kind in change.policy.kinds if kind.name == name), None)


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
    up = {node.id: node for node in change.nodes.rows.values() if node.phase is NodePhase.UP}
    if not could_ever_hold((), up, need):
        return True
    tickets = change.queues.rows.get(model)
    return tickets is None or change.now >= change.waiters.rows[tickets[0]].since + change.policy.growth_after_s
