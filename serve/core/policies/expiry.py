"""Node expiry: when a node starts handing over, when it drains, when it is declared gone."""

from __future__ import annotations

import math
from dataclasses import replace

from serve.core.effects import KillAgent
from serve.core.engine_use import needs_replacement
from serve.core.looking import by_type, first_drain_at, not_just_serving
from serve.core.node_times import wait_for_node_s
from serve.core.room import holds, need_of
from serve.core.state import Node, NodePhase, live, sleeps
from serve.core.table import seen
from serve.core.transaction import Transaction
from serve.core.transitions import begin_stop, lose


def review(tx: Transaction) -> None:
    """Time limits of nodes:

    (1) a node is ending when so much of its time is left as getting another one takes: queue, start, and the load of
        those of its models that need a replacement, by the last times measured; never in the first half of its time;
    (2) at ``drain_at`` it leaves: its engines' routes drain;
    (3) its block has ended, and its engines do not answer: it is gone.
    """
    now = tx.now
    first = seen(tx.nodes.rows, first_drain_at)
    if first == math.inf:
        return
    types = seen(tx.nodes.rows, by_type)
    waits = {name: wait_for_node_s(tx, name) + tx.policy.handover_margin_s for name in types}
    slowest = max((tx.policy.load_guess_s, *tx.load_s.rows.values()))
    horizon = now + max(waits.values()) + slowest
    for node in list(tx.nodes.rows.values()) if first <= horizon else ():
        if node.drain_at is None or node.drain_at > horizon or node.phase is NodePhase.PENDING:
            continue
        if now >= node.drain_at:
            if not node.drain_asked:  # (2)
                _leave(tx, node)
            elif _is_gone(tx, node):  # (3)
                lose(tx, node)
                tx.emit(KillAgent(node.id))
        elif not node.ending:
            wait_s = waits[node.type]
            if now >= node.drain_at - wait_s - slowest and now >= _ending_at(tx, node, node.drain_at, wait_s):
                tx.nodes.put(node.id, replace(node, ending=True))  # (1)


def _ending_at(tx: Transaction, node: Node, drain_at: float, wait_s: float) -> float:
    engines = [tx.engines.rows[engine] for engine in node.engines]
    loads = [tx.load_time_s(engine.model) for engine in engines if needs_replacement(tx, engine)]
    at = drain_at - wait_s - max(loads, default=tx.policy.load_guess_s)
    return at if node.half_at is None else max(at, node.half_at)


def release_ending(tx: Transaction, unplaced: tuple[str, ...]) -> None:
    """These models found no room: nodes that are ending and empty have too little time left for them, and may block
    others (``max_nodes``)."""
    needs = [need_of(tx.models[name]) for name in unplaced]
    for node in [node for node in seen(tx.nodes.rows, not_just_serving) if node.ending and not node.engines]:
        if node.phase is NodePhase.UP and any(holds(node, need) for need in needs):
            _leave(tx, node)


def _leave(tx: Transaction, node: Node) -> None:
    phase = NodePhase.LEAVING if node.phase is NodePhase.UP else node.phase
    tx.nodes.put(node.id, replace(node, phase=phase, since=tx.now, drain_asked=True, ending=True))
    for name in node.engines:
        engine = tx.engines.rows[name]
        if live(engine) or sleeps(engine):
            begin_stop(tx, engine, "node-ends")


def _is_gone(tx: Transaction, node: Node) -> bool:
    block = tx.blocks.get(node.block)
    if block is None or not block.phase.ended or node.leave_at is None:
        return False
    return tx.now >= max(node.leave_at, node.since) + tx.policy.command_retry_s
