"""Who asks for which model: noted from the waiters, and what follows for an idle engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from serve.core.callers import CALLERS_MAX, after, all_wait, asked, calls, tag, turn
from serve.core.engine_use import idle
from serve.core.state import Engine, Waiter
from serve.core.transaction import Transaction


def note_caller(tx: Transaction, waiter: Waiter) -> None:
    """Its requester asks for a model that does not serve."""
    name = tag(waiter.requester)
    if not name:
        return
    before = tx.callers.rows.get(name)
    last = turn(before, tx.now)
    if last in tx.models:
        tx.follows.put(last, after(tx.follows.rows.get(last, ()), waiter.model))
    waits = before is not None and before.ticket in tx.waiters.rows
    tx.callers.drop(name)  # the latest are last
    tx.callers.put(name, calls(before, waiter.model, waiter.ticket, tx.now, waits=waits))
    if len(tx.callers.rows) > CALLERS_MAX:
        tx.callers.drop(next(iter(tx.callers.rows)))


def note_asked(tx: Transaction, model: str) -> None:
    """The waiters of ``model`` are about to be released."""
    waiting = tx.waiting(model)
    found = asked(frozenset(tag(one.requester) for one in waiting), len(waiting), tx.now)
    if found is None:
        tx.asked.drop(model)
    else:
        tx.asked.put(model, found)


def deserted(tx: Transaction, engine: Engine) -> bool:
    """It is idle, and all requesters of its latest requests wait for other models: none of them asks for it before it
    is answered."""
    last = tx.asked.rows.get(engine.model)
    return last is not None and idle(tx, engine) and all_wait(last, tx.callers.rows, _waiting(tx), tx.now)


def _waiting(tx: Transaction) -> Mapping[str, int]:
    """Requester -> its waiters."""
    if _waiting not in tx.memo:
        tx.memo[_waiting] = Counter(tag(waiter.requester) for waiter in tx.waiters.rows.values())
    found: Mapping[str, int] = tx.memo[_waiting]
    return found
