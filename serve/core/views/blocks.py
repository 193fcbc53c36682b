"""Blocks as people and programs see them: the ledger's entries, merged with the nodes that the blocks became."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gateway_plugin.phases import BlockPhase
from serve.core.events import SeenBlock
from serve.core.node_times import waited_s
from serve.core.state import Fleet, Node, NodePhase


def blocks_view(fleet: Fleet, now: float, ended: bool = False) -> list[dict[str, Any]]:
    """One row for every block that holds a place, oldest first; with ``ended`` also the latest ones that ended.

    A requested node that has no block yet is a row without a name. Times are seconds from ``now``.
    """
    nodes = {node.block: node for node in fleet.nodes.values() if node.block}
    blocks = sorted(fleet.blocks.values(), key=lambda block: (block.asked_at, block.name))
    holding = [block for block in blocks if not block.phase.ended]
    rows = [_row(fleet, block, nodes.get(block.name), now) for block in holding]
    known = {block.name for block in holding}
    rows += [_row(fleet, None, node, now) for name, node in sorted(nodes.items()) if name not in known]
    rows += [_row(fleet, None, node, now) for node in _without_block(fleet, holding, nodes)]
    if ended:
        over = sorted((b for b in blocks if b.phase.ended), key=lambda b: (-(b.ended_at or 0.0), b.name))
        rows += [_row(fleet, block, None, now) for block in over]
    return rows


def _without_block(fleet: Fleet, holding: Iterable[SeenBlock], nodes: dict[str, Node]) -> list[Node]:
    """Pending nodes beyond the blocks that are there for them: their pairing is not known before one joins."""
    on_the_way: dict[str, int] = {}
    for block in holding:
        if block.name not in nodes and block.phase is not BlockPhase.CANCELLING:
            on_the_way[block.type] = on_the_way.get(block.type, 0) + 1
    without = []
    for node in sorted(fleet.nodes.values(), key=lambda node: (node.since, node.id)):
        if node.phase is NodePhase.PENDING and not node.block:
            on_the_way[node.type] = on_the_way.get(node.type, 0) - 1
            if on_the_way[node.type] < 0:
                without.append(node)
    return without


def _row(fleet: Fleet, block: SeenBlock | None, node: Node | None, now: float) -> dict[str, Any]:
    engines = [fleet.engines[name] for name in node.engines] if node is not None else ()
    pending = block is not None and block.phase.queued
    holds = block is None or not block.phase.ended
    asked_at = block.asked_at if block is not None else node.since if node is not None else now
    return {
        "name": block.name if block is not None else (node.block or None) if node is not None else None,
        "type": block.type if block is not None else node.type if node is not None else None,
        "state": _state(block, node),
        "phase": block.phase if block is not None else None,
        "job": block.job if block is not None else None,
        "reason": _reason(fleet, block, node),
        "host": block.host if block is not None and block.host else (node.address or None) if node else None,
        "node": node.id if node is not None else None,
        "age_s": _seconds(now - asked_at),
        "starts_in_s": _seconds(block.starts_at - now) if block and pending and block.starts_at is not None else None,
        "ends_in_s": _seconds(block.ends_at - now) if block and holds and not pending and block.ends_at else None,
        "leaves_in_s": _seconds(node.leave_at - now) if node is not None and node.leave_at is not None else None,
        "ended_s": _seconds(now - block.ended_at) if block is not None and block.ended_at is not None else None,
        "models": [
            {"model": engine.model, "state": engine.state._value_, "in_flight": engine.in_flight} for engine in engines
        ],
        "in_flight": sum([engine.in_flight for engine in engines]),
    }


def _state(block: SeenBlock | None, node: Node | None) -> str:
    """The first that is true:

    (1) it ended: how; (2) ``draining``: it takes no new request, and has models; (3) ``leaving``: about to end, or
    empty and on its way; (4) ``adopting``: its agent died and is created again; (5) ``ending``: its models are handed
    over, because its end is near; (6) ``serving``, or ``idle`` without a model; (7) ``starting``: its job runs, its
    node has not joined; (8) ``pending``: in the queue; (9) ``asked``: Ray has not submitted a block for it yet.
    """
    if block is not None and block.phase.ended:  # (1)
        return block.phase
    if node is not None and node.phase is NodePhase.LEAVING and node.engines:  # (2)
        return "draining"
    if (node is not None and node.phase is NodePhase.LEAVING) or (
        block is not None and block.phase is BlockPhase.CANCELLING
    ):
        return "leaving"  # (3)
    if node is not None and node.phase is NodePhase.ORPHANED:  # (4)
        return "adopting"
    if node is not None and node.phase is NodePhase.UP:
        if node.ending:  # (5)
            return "ending"
        return "serving" if node.engines else "idle"  # (6)
    if block is None:  # (9)
        return "asked"
    return "pending" if block.phase.queued else "starting"  # (8) (7)


def _reason(fleet: Fleet, block: SeenBlock | None, node: Node | None) -> str | None:
    if block is not None:
        return block.reason
    failure = fleet.agent_failures.get(node.type) if node is not None else None
    return failure.reason if failure is not None else None


def _seconds(span: float) -> float:
    return round(span, 1) if span > 0 else 0.0


def blocks_by_phase(fleet: Fleet) -> dict[tuple[str, str], int]:
    """``(type, phase)`` -> how many blocks; every type of the site has every phase in which a block holds a place."""
    found = {(kind.name, phase.value): 0 for kind in fleet.policy.node_types for phase in BlockPhase if not phase.ended}
    for block in fleet.blocks.values():
        if not block.phase.ended:
            found[block.type, block.phase] = found.get((block.type, block.phase), 0) + 1
    return found


def next_end_s(fleet: Fleet, now: float) -> dict[str, float]:
    """Type -> seconds until the first walltime of its running blocks ends; no entry where none has one."""
    ends: dict[str, float] = {}
    for block in fleet.blocks.values():
        if block.phase is BlockPhase.RUNNING and block.ends_at is not None:
            ends[block.type] = min(block.ends_at, ends.get(block.type, block.ends_at))
    return {name: _seconds(at - now) for name, at in ends.items()}


def last_queue_wait_s(fleet: Fleet, now: float) -> dict[str, float]:
    """Type -> queue time in seconds of its block that started last; no entry before there is one."""
    return {kind: _seconds(waits[-1]) for kind, waits in waited_s(fleet.blocks.values(), now).items()}
