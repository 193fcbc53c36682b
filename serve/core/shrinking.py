"""Which nodes are given back: those that nobody needs, the cheapest to lose first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from serve.core.change import Change, live
from serve.core.effects import KillAgent
from serve.core.events import NodeDrainAsked
from serve.core.eviction import idle, used_at
from serve.core.fleet import Node, NodePhase
from serve.core.nodes import node_drain_asked
from serve.core.placement import holds, need_of


def shrink(change: Change, surplus: frozenset[str], spare: Mapping[str, int]) -> None:
    """Give back what is not needed. ``surplus``: pending nodes without a use; ``spare``: nodes of each type above its
    ``min_nodes``.

    (1) A pending node is surplus from when nobody needs it until somebody does.
    (2) A node that is due is one empty for ``block_idle_s``, or one whose engines have all been unused for
        ``block_unused_s``; the last one here only after ``last_block_idle_s``; none that a wanted model could use.
    (3) Surplus pending nodes go first: after ``pending_idle_s``, and at once where a node of their type is due.
    (4) Then those that are due: empty ones first, then the cheapest to lose; engines leave behind drained routes.
    """
    spare = dict(spare)
    for node in [node for node in change.nodes.rows.values() if node.phase is NodePhase.PENDING]:
        if (node.id in surplus) != (node.idle_since is not None):  # (1)
            change.nodes.put(node.id, replace(node, idle_since=change.now if node.id in surplus else None))
    due = _due(change)  # (2)
    pressed = {node.type for node in due}
    for name in sorted(surplus):  # (3)
        node = change.nodes.rows[name]
        since = change.now if node.idle_since is None else node.idle_since
        ripe = node.type in pressed or change.now >= since + change.policy.pending_idle_s
        if ripe and spare.get(node.type, 0) > 0:
            spare[node.type] -= 1
            give_back(change, node)
    for node in due:  # (4)
        if spare.get(node.type, 0) <= 0:
            continue
        spare[node.type] -= 1
        if node.engines:
            node_drain_asked(change, NodeDrainAsked(node.id))
        else:
            give_back(change, node)


def give_back(change: Change, node: Node) -> None:
    """End the agent of an empty node: its block goes."""
    change.nodes.drop(node.id)
    change.unsettled -= {node.id}
    change.emit(KillAgent(node.id))


def _due(change: Change) -> list[Node]:
    """Nodes to give back, the first to go first."""
    policy, now = change.policy, change.now
    here = 0
    ripe: list[tuple[float, float, Node]] = []
    for node in change.nodes.rows.values():
        if node.drain_asked or node.phase not in (NodePhase.UP, NodePhase.ORPHANED):
            continue
        here += 1
        since = _unused_since(change, node)
        patience = policy.block_unused_s if node.engines else policy.block_idle_s
        if since is not None and patience is not None and now >= since + patience:
            ripe.append((loss(change, node), since, node))
    ripe.sort(key=lambda entry: (*entry[:2], entry[2].id))
    due = []
    for _, since, node in ripe:
        if here == 1 and now < since + policy.last_block_idle_s:
            continue
        if not _of_use(change, node):
            due.append(node)
            here -= 1
    return due


def _unused_since(change: Change, node: Node) -> float | None:
    """Since when nothing on it has been used; ``None``: something is, or may be at once, or its agent is away."""
    if node.phase is not NodePhase.UP:
        return None
    if not node.engines:
        return node.idle_since
    since = 0.0
    for name in node.engines:
        engine = change.engines.rows[name]
        if engine.in_flight or not idle(change, engine) or change.wanted(engine.model):
            return None
        since = max(since, used_at(engine), engine.answered_at)
    return since


def loss(change: Change, node: Node) -> float:
    """What it costs to lose it: the seconds to load again what is on it, each by how lately it was used.

    A model unused for an hour is half as likely to be asked for in the next minute as one unused for half an hour.
    """
    rows, policy = change.engines.rows, change.policy
    return sum(
        change.load_s.rows.get(rows[name].model, policy.load_guess_s) / max(1.0, change.now - used_at(rows[name]))
        for name in node.engines
    )


def _of_use(change: Change, node: Node) -> bool:
    """A wanted model without an engine (it may be backing off after a failure) would fit on it."""
    wanted = (*change.queues.rows, *change.pinned, *change.wished.rows)
    return any(
        holds(node, need_of(change.models[model])) and not any(map(live, change.engines_of(model)))
        for model in wanted
        if model in change.models
    )
