"""How many nodes: one more for a wanted model that fits nowhere, one less when it has been empty and unneeded."""

from __future__ import annotations

from dataclasses import replace

from serve.core.change import Change, live
from serve.core.effects import CreateAgent, KillAgent
from serve.core.eviction import Need, Room
from serve.core.fleet import Node, NodeKind, NodePhase
from serve.core.placement import holds, need_of


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
    empty: list[Node] = []
    count: dict[str, int] = {}
    staying: dict[str, int] = {}
    kinds = {kind.name: kind for kind in change.policy.kinds}
    for node in list(change.nodes.rows.values()):
        if node.drain_asked and not node.engines and node.phase in (NodePhase.LEAVING, NodePhase.PENDING):  # (1)
            _give_back(change, node)
            continue
        count[node.type] = count.get(node.type, 0) + 1
        if node.drain_asked:
            continue
        staying[node.type] = staying.get(node.type, 0) + 1
        if node.phase is NodePhase.PENDING:
            if node.type in kinds:
                pending[node.id] = Room(kinds[node.type].host_mib, kinds[node.type].gpu_mib)
        elif node.phase is NodePhase.UP and not node.engines:
            empty.append(node)
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
    _give_back_unneeded(change, [node for node in sorted(pending) if node not in needed], empty, spare)


def _give_back_unneeded(change: Change, pending: list[str], empty: list[Node], spare: dict[str, int]) -> None:
    """``pending``: those that nobody needs; ``spare``: how many nodes of a type are above its ``min_nodes``."""
    now, policy = change.now, change.policy
    for node in [node for node in change.nodes.rows.values() if node.phase is NodePhase.PENDING]:
        unneeded = node.id in pending and spare.get(node.type, 0) > 0
        if unneeded and node.idle_since is None:
            change.nodes.put(node.id, replace(node, idle_since=now))
        elif not unneeded and node.idle_since is not None:
            change.nodes.put(node.id, replace(node, idle_since=None))
    due = [change.nodes.rows[node] for node in pending]
    due = [n for n in due if n.idle_since is not None and now >= n.idle_since + policy.pending_idle_s]
    long_empty = [n for n in empty if n.idle_since is not None and now >= n.idle_since + policy.block_idle_s]
    long_empty.sort(key=lambda node: (node.idle_since, node.id))
    for node in (*due, *(node for node in long_empty if not _of_use(change, node))):  # (6), (7)
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
