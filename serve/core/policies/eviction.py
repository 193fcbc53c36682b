"""The plain rule, for comparison: the least recently used of the idle engines, in the order of the oldest waiters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from serve.core.engine_use import may_go
from serve.core.state import Engine, used_at
from serve.core.transaction import Transaction


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


def price(tx: Transaction, engines: Sequence[Engine], cost: float) -> float:
    return cost


def held_s(tx: Transaction, engine: Engine) -> float:
    """A busy one is never evicted, however long that is."""
    return 0.0 if may_go(tx, engine) else math.inf


def used_last(tx: Transaction, engine: Engine) -> float:
    return used_at(engine)


def not_weighed(tx: Transaction, engine: Engine, asking: str) -> float:
    return 0.0


def no_limit(tx: Transaction, asking: str) -> float:
    return math.inf


def recency(tx: Transaction, asking: str, worth: float) -> str:
    return f"of the idle engines it is the least recently used: {tx.now - worth:.0f} s ago"
