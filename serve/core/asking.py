"""Who asks for which model, and after which: noted from the waiters, and what follows from it for an idle engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from serve.core.callers import CALLERS_MAX, after, all_wait, asked, calls, share, tag, turn
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


GROUP_S = 60.0
"""How long after a request for it the models that workflows ask next are expected."""
GROUPED = 0.9
"""Probability that a model of the same ``group`` of the catalog is asked next."""


def expected(tx: Transaction, model: str) -> float:
    """Probability that ``model`` is asked soon as one that workflows ask before it is asked now: that one waits to be
    loaded, or was used in the last minute."""
    if expected not in tx.memo:
        tx.memo[expected] = _expected(tx)
    found: Mapping[str, float] = tx.memo[expected]
    return found.get(model, 0.0)


def _expected(tx: Transaction) -> Mapping[str, float]:
    groups = {name: model.group for name, model in tx.models.items() if model.group}
    members: dict[str, list[str]] = {}
    for name, group in groups.items():
        members.setdefault(group, []).append(name)
    found: dict[str, float] = {}
    for name in {*tx.follows.rows, *groups}:
        habit = tx.habits.rows.get(name)
        if name not in tx.queues.rows and (habit is None or tx.now > habit.last + GROUP_S):
            continue
        known = tx.follows.rows.get(name, ())
        following = [(other, share(known, other)) for other, _ in known]
        following += [(other, GROUPED) for other in members.get(groups.get(name, ""), ())]
        for other, probability in following:
            if other != name:
                found[other] = max(probability, found.get(other, 0.0))
    return found


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
