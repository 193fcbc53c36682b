"""Which engines may go for another model at all, and the plain rule of the least recently used, kept for comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

from serve.core.engine_use import abandoned, idle
from serve.core.state import Engine, EngineState, NodePhase, RouteState, ready_at, stalled, used_at
from serve.core.transaction import Transaction


def may_go(tx: Transaction, engine: Engine, *, busy: bool = False) -> bool:
    """No demand for its model (a pin is demand), on nodes that take commands; resident for long enough and idle,
    stalled or (``busy``) in use; or a load whose waiters have all left."""
    if engine.in_flight and not busy and engine.stalled_since is None:
        return False  # the fast path for a busy engine
    if tx.wanted(engine.model):
        return False
    if abandoned(tx, engine):
        return _up(tx, engine)
    open_route = engine.state is EngineState.READY and engine.route is RouteState.OPEN
    served = open_route if busy else idle(tx, engine)
    if not (served or stalled(engine)):
        return False
    model = tx.models.get(engine.model)
    resident = model is None or tx.now >= ready_at(engine) + model.min_residency_s
    return resident and _up(tx, engine)


def oldest_first(tx: Transaction) -> list[str]:
    """Models that are wanted: those with waiters by their oldest, then other demand, last those without a waiting
    client; ties by name."""
    oldest = {model: tx.attended(model) for model in tx.queues.rows}
    queued = sorted((waiter.since, model) for model, waiter in oldest.items() if waiter is not None)
    unasked = sorted(model for model in tx.pinned | tx.requested_until.rows.keys() if oldest.get(model) is None)
    waiters = tx.waiters.rows
    last = sorted((waiters[tx.queues.rows[m][0]].since, m) for m in oldest if tx.unattended(m))
    order = (*(model for _, model in queued), *unasked, *(model for _, model in last))
    return [model for model in order if model in tx.models]


def least_recently_used(tx: Transaction, asking: str) -> Sequence[tuple[float, Engine]]:
    """Idle engines only, the least recently used first."""
    found: list[tuple[float, Engine]] | None = tx.memo.get(least_recently_used)
    if found is None:
        found = [(used_at(engine), engine) for engine in tx.engines.rows.values() if may_go(tx, engine)]
        found.sort(key=lambda one: (one[0], one[1].node, one[1].id))
        tx.memo[least_recently_used] = found
    return found


def no_limit(tx: Transaction, asking: str) -> float:
    return math.inf


def recency(tx: Transaction, asking: str, worth: float) -> str:
    return f"of the idle engines it is the least recently used: {tx.now - worth:.0f} s ago"


def _up(tx: Transaction, engine: Engine) -> bool:
    return all(node.phase is NodePhase.UP for node in tx.nodes_of(engine))
