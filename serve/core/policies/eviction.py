"""Whom to evict so that another model can be loaded: idle engines, least recently used first, the fewest on one node.

Busy engines are never victims here, unless they do not move. The issue on switching adds that a model whose waiter has
waited ``max_wait_s`` may drain a busy engine, and that victims are weighed by priority and reload cost: both belong
into ``idle`` and ``used_at``.
"""

from __future__ import annotations

from serve.core.engine_use import abandoned, idle
from serve.core.state import Engine, NodePhase, ready_at, stalled, used_at
from serve.core.transaction import Transaction


def evictable(tx: Transaction, engine: Engine) -> bool:
    """Wanted by nobody (pins are wants), on a node that can be told to stop it; idle or stalled and resident for long
    enough, or a load that all who waited for it have left."""
    if tx.wanted(engine.model):
        return False
    if abandoned(tx, engine):
        return tx.nodes.rows[engine.node].phase is NodePhase.UP
    if not (idle(tx, engine) or stalled(engine)):
        return False
    model = tx.models.get(engine.model)
    resident = model is None or tx.now >= ready_at(engine) + model.min_residency_s
    return resident and tx.nodes.rows[engine.node].phase is NodePhase.UP


def eviction_rank(tx: Transaction, engine: Engine) -> float:
    """The least recently used first: when it was last used, or became ready."""
    return used_at(engine)
