"""Nodes whose end comes: from when on they are ending, when they leave, when they are gone whatever they say."""

from __future__ import annotations

from dataclasses import replace

from serve.core.blocks import ENDED, wait_for_node_s
from serve.core.change import Change, live
from serve.core.effects import KillAgent
from serve.core.fleet import Engine, EngineState, Node, NodePhase
from serve.core.nodes import lose
from serve.core.placement import holds, need_of
from serve.core.routes import retire


def review(change: Change) -> None:
    """What time brings to nodes:

    (1) a node is ending when so much of its time is left as getting another one takes: queue, start, and the load of
        those of its models that matter, as lately seen; at most the second half of its useful time;
    (2) at ``drain_at`` it leaves: its engines' routes drain;
    (3) its block has ended, and its engines do not answer: it is gone.
    """
    now = change.now
    waits: dict[str, float] = {}
    slowest: float | None = None
    for node in list(change.nodes.rows.values()):
        if node.drain_at is None or node.phase is NodePhase.PENDING:
            continue
        if now >= node.drain_at:
            if not node.drain_asked:  # (2)
                _leave(change, node)
            elif _is_gone(change, node):  # (3)
                lose(change, node)
                change.emit(KillAgent(node.id))
        elif not node.ending:
            if node.type not in waits:
                waits[node.type] = wait_for_node_s(change, node.type) + change.policy.succession_margin_s
            if slowest is None:
                slowest = max((change.policy.load_guess_s, *change.load_s.rows.values()))
            wait_s = waits[node.type]
            if now >= node.drain_at - wait_s - slowest and now >= _ending_at(change, node, node.drain_at, wait_s):
                change.nodes.put(node.id, replace(node, ending=True))  # (1)


def _ending_at(change: Change, node: Node, drain_at: float, wait_s: float) -> float:
    engines = [change.engines.rows[engine] for engine in node.engines]
    loads = [change.load_time_s(engine.model) for engine in engines if matters(change, engine)]
    at = drain_at - wait_s - max(loads, default=change.policy.load_guess_s)
    return at if node.half_at is None else max(at, node.half_at)


def matters(change: Change, engine: Engine) -> bool:
    """Its model will be missed: it is wanted, something is in flight, or it was used lately or will be in a moment."""
    policy = change.policy
    return (
        engine.in_flight > 0
        or change.wanted(engine.model)
        or change.now < engine.last_used + policy.succession_used_s
        or (engine.state is EngineState.READY and change.now < engine.answered_at + policy.first_use_grace_s)
    )


def let_go(change: Change, unplaced: tuple[str, ...]) -> None:
    """These models found no room: nodes that are ending and empty have too little time left for them, and may stand in
    the way of others (``max_nodes``)."""
    needs = [need_of(change.models[name]) for name in unplaced]
    for node in [node for node in change.nodes.rows.values() if node.ending and not node.engines]:
        if node.phase is NodePhase.UP and any(holds(node, need) for need in needs):
            _leave(change, node)


def _leave(change: Change, node: Node) -> None:
    phase = NodePhase.LEAVING if node.phase is NodePhase.UP else node.phase
    change.nodes.put(node.id, replace(node, phase=phase, since=change.now, drain_asked=True, ending=True))
    for name in node.engines:
        engine = change.engines.rows[name]
        if live(engine):
            retire(change, engine, "node-ends")


def _is_gone(change: Change, node: Node) -> bool:
    block = change.blocks.get(node.block)
    if block is None or block.phase not in ENDED or node.leave_at is None:
        return False
    return change.now >= max(node.leave_at, node.since) + change.policy.command_retry_s
