"""Which engines to evict so that another model can be loaded: idle, least recently used first, fewest on one node.

Busy engines are never victims here, unless they are stalled. The issue on switching adds that a model whose waiter has
waited ``max_wait_s`` may drain a busy engine, and that victims are weighed by priority and reload cost: both belong
into ``idle`` and ``used_at``.
"""

from __future__ import annotations

from serve.core.engine_use import abandoned, idle
from serve.core.state import Engine, EngineState, NodePhase, ready_at, stalled, used_at
from serve.core.transaction import Transaction


def evictable(tx: Transaction, engine: Engine) -> bool:
    """No demand for its model (a pin is demand), on nodes that take commands; idle or stalled and resident for long
    enough, or a load whose waiters have all left, or one that sleeps: its stop frees what it kept of its GPUs."""
    if engine.in_flight and engine.stalled_since is None:
        return False  # the fast path for a busy engine
    if tx.wanted(engine.model):
        return False
    if abandoned(tx, engine) or engine.state is EngineState.ASLEEP:
        return _up(tx, engine)
    if not (idle(tx, engine) or stalled(engine)):
        return False
    model = tx.models.get(engine.model)
    resident = model is None or tx.now >= ready_at(engine) + model.min_residency_s
    return resident and _up(tx, engine)


def eviction_rank(tx: Transaction, engine: Engine) -> float:
    """The least recently used first: when it was last used, or became ready."""
    return used_at(engine)


def _up(tx: Transaction, engine: Engine) -> bool:
    return all(node.phase is NodePhase.UP for node in tx.nodes_of(engine))
