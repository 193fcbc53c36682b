"""Pressure against possession: when a waiting model gets the room of others, and whose.

A model without a place weighs the seconds that its waiters have waited (``weight``). An engine is worth the seconds
of waiting that its loss would cause (``loss_s``): how likely its model is requested within the time of a load, times
its load. (A model that workflows use after one that is asked now is likely to be requested.) It goes when the waiters
weigh as much. A busy engine keeps its place for a quantum, then it is a victim like any other: it is drained, and its
next requests wait. A model near its bound is next, at any cost to others.

After max-weight scheduling of queues with switch-over times (Celik and Modiano, 2012), with what a switch costs others
as its hysteresis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from serve.core.asking import deserted, expected
from serve.core.engine_use import idle, may_go, surplus
from serve.core.habits import likely, rate
from serve.core.shares import weights
from serve.core.sleep_room import could_sleep, outlived
from serve.core.state import Engine, EngineState, ready_at, stalled
from serve.core.transaction import Transaction


@dataclass(frozen=True)
class Weight:
    """Of one waiting model."""

    waiters: int
    oldest_s: float
    """The longest wait, one of lower priority counted in part."""
    seconds: float
    """Seconds of waiting, the more the longer the oldest has waited."""
    bound_s: float
    """How long its requests wait at most, if room can be made in time."""
    overdue: bool
    """Its load must begin now, or the bound is passed."""


def weight(tx: Transaction, model: str) -> Weight:
    """Of the waiters of ``model``."""
    known: Weight | None = tx.memo.get((weight, model))
    if known is None:
        known = tx.memo[weight, model] = _weigh(tx, model)
    return known


def _weigh(tx: Transaction, model: str) -> Weight:
    policy, load_s = tx.policy, return_s(tx, model)
    bound_s = max(policy.max_wait_s, policy.max_wait_loads * load_s)
    waiters = [tx.waiters.rows[ticket] for ticket in tx.queues.rows.get(model, ())]
    if not waiters:
        return Weight(0, 0.0, 0.0, bound_s, False)
    shares = weights(waiters)
    waited = [share * (tx.now - one.since) for share, one in zip(shares, waiters, strict=True)]
    oldest_s = max(waited)
    seconds = (sum(waited) + policy.head_start_s * sum(shares)) * (1 + policy.impatience * oldest_s / max(1.0, load_s))
    overdue = oldest_s >= bound_s - load_s - min(_drain_s(tx), bound_s / 4)
    return Weight(len(waiters), oldest_s, seconds, bound_s, overdue)


def return_s(tx: Transaction, model: str) -> float:
    """How long ``model`` takes to serve once it has room: a wake where it sleeps, else a load."""
    if any(engine.state is EngineState.ASLEEP for engine in tx.engines_of(model)):
        return _wake_s(tx, model)
    return _load_s(tx, model)


def _back_s(tx: Transaction, engine: Engine) -> float:
    """How long its model takes to be back after its eviction: a wake if it can sleep until then."""
    if engine.state is EngineState.ASLEEP:
        return _load_s(tx, engine.model)
    sleeps = engine.can_sleep and could_sleep(tx, engine)
    return _wake_s(tx, engine.model) if sleeps else _load_s(tx, engine.model)


def _wake_s(tx: Transaction, model: str) -> float:
    return min(_load_s(tx, model), tx.wake_time_s(model))


def sleep_worth(tx: Transaction, engine: Engine) -> float:
    """Seconds of waiting, for each GiB of its host memory, that the loss of an engine that sleeps causes; none
    where its model has another one (``outlived``)."""
    if outlived(tx, engine):
        return 0.0
    longer_s = max(0.0, _load_s(tx, engine.model) - _wake_s(tx, engine.model))
    held_mib = max(1, engine.sleep_mib)
    return loss_s(tx, engine.model, 0.0, longer_s, in_use=False) * 1024 / held_mib


def blocked_s(tx: Transaction, engine: Engine, asking: str) -> float:
    """Seconds of waiting that a load of ``asking`` on its GPUs causes to an engine that sleeps."""
    return _blocked_s(tx, engine.model, _rounded(_load_s(tx, asking)))


def _blocked_s(tx: Transaction, model: str, for_s: float) -> float:
    """A model that is asked while something loads on its GPUs waits for half of that on average."""
    return loss_s(tx, model, 0.0, for_s, in_use=False) / 2


def _load_s(tx: Transaction, model: str) -> float:
    """One never loaded here: as long as the others on average."""
    known = tx.load_s.rows.get(model)
    if known is not None:
        return known
    if _load_s not in tx.memo:
        others = tx.load_s.rows.values()
        tx.memo[_load_s] = sum(others) / len(others) if others else tx.policy.load_guess_s
    found: float = tx.memo[_load_s]
    return found


def _drain_s(tx: Transaction) -> float:
    """How long the slowest of late needed to finish what was in flight, and to stop."""
    if _drain_s not in tx.memo:
        tx.memo[_drain_s] = 5.0 + max(tx.drain_s.rows.values(), default=0.0)
    found: float = tx.memo[_drain_s]
    return found


def order(tx: Transaction) -> list[str]:
    """Wanted models: (1) past their bound, the longest waiting first; (2) those for which others drain already;
    (3) other waiting ones by weight per GPU; (4) other demand; (5) those whose clients did not wait; ties by name."""
    keys: list[tuple[int, float, str]] = []
    for model in tx.queues.rows:
        if model not in tx.models:
            continue
        if tx.attended(model) is None and not tx.wanted(model):
            keys.append((4, tx.waiters.rows[tx.queues.rows[model][0]].since, model))  # (5)
            continue
        weighed = weight(tx, model)
        if weighed.overdue:
            keys.append((0, -weighed.oldest_s, model))  # (1)
        elif model in tx.room_for.rows:
            keys.append((1, tx.room_for.rows[model], model))  # (2)
        else:
            keys.append((2, -weighed.seconds / max(1, tx.models[model].gpus), model))  # (3)
    asked = tx.pinned | tx.requested_until.rows.keys()
    keys += [(3, 0.0, model) for model in asked if model in tx.models and model not in tx.queues.rows]  # (4)
    return [model for *_, model in sorted(keys)]


def limit(tx: Transaction, asking: str) -> float:
    """What may be evicted for ``asking``: anything if it is past its bound, or an administrator asks for it."""
    if asking not in tx.queues.rows:
        return math.inf
    weighed = weight(tx, asking)
    return math.inf if weighed.overdue else weighed.seconds / tx.policy.switch_gain


def candidates(tx: Transaction, asking: str) -> Sequence[tuple[float, Engine]]:
    """Engines and what each is worth while ``asking`` has no place, the cheapest first. Busy ones are looked at only
    where they could go."""
    urgent = asking in tx.queues.rows and weight(tx, asking).overdue
    with_busy = urgent or (asking in tx.queues.rows and limit(tx, asking) >= return_s(tx, asking) + _least_load_s(tx))
    away_s, drain_s = _rounded(return_s(tx, asking)), _rounded(tx.drain_s.rows.get(asking, 0.0))
    key = (candidates, with_busy, away_s, drain_s)
    found: list[tuple[float, Engine]] | None = tx.memo.get(key)
    if found is None:
        found = []
        for engine, in_use, kept in _that_may_go(tx, with_busy):
            if not kept:
                # without clients, or of no use to them, or others serve them
                spare = engine.model in tx.spreads.rows and surplus(tx, engine)
                useless = spare or engine.state is EngineState.LOADING or stalled(engine)
                back_s = drain_s + _back_s(tx, engine)  # what it makes way for serves then, and drains first
                lost_s = 0.0 if useless else loss_s(tx, engine.model, away_s, back_s, in_use=in_use)
                if not (useless or in_use or engine.state is EngineState.ASLEEP) and could_sleep(tx, engine):
                    lost_s += _blocked_s(tx, engine.model, away_s)  # it wakes on the same GPUs
                found.append((lost_s, engine))
        found.sort(key=lambda one: (one[0], one[1].node, one[1].id))
        tx.memo[key] = found
    return found


def _rounded(seconds: float) -> float:
    """To a power of the root of 2: models of similar load times share one list of candidates."""
    return 0.0 if seconds <= 0 else math.sqrt(2.0) ** round(2 * math.log2(seconds))


def _that_may_go(tx: Transaction, with_busy: bool) -> Sequence[tuple[Engine, bool, bool]]:
    """Each engine, whether it is in use, and whether its quantum is not over."""
    found: list[tuple[Engine, bool, bool]] | None = tx.memo.get((_that_may_go, with_busy))
    if found is not None:
        return found
    found = []
    for engine in tx.engines.rows.values():
        if engine.in_flight and not with_busy and engine.stalled_since is None:
            continue
        in_use = engine.in_flight > 0 or not idle(tx, engine)
        in_use = in_use and engine.state is EngineState.READY and not stalled(engine)
        if may_go(tx, engine, busy=in_use):
            found.append((engine, in_use, in_use and _quantum_left_s(tx, engine) > 0))
    tx.memo[_that_may_go, with_busy] = found
    return found


def _quantum_left_s(tx: Transaction, engine: Engine) -> float:
    """Of one that can sleep the switch is a drain and a wake, of which the drain is the most. A longer drain than
    ``max_wait_s`` counts no more: after one request of ten minutes others would wait for twenty."""
    switch_s = _back_s(tx, engine)
    if could_sleep(tx, engine):
        switch_s += min(tx.policy.max_wait_s, tx.drain_s.rows.get(engine.model, 0.0))
    return ready_at(engine) + tx.policy.quantum_loads * switch_s - tx.now


def held_s(tx: Transaction, engine: Engine) -> float:
    """Until its quantum and its residency are over."""
    model = tx.models.get(engine.model)
    resident_s = 0.0 if model is None else ready_at(engine) + model.min_residency_s - tx.now
    return max(0.0, resident_s, _quantum_left_s(tx, engine))


def loss_s(tx: Transaction, model: str, away_s: float, back_s: float, *, in_use: bool) -> float:
    """Seconds of waiting that the loss of a model's engine causes while another model loads for ``away_s`` and until it
    is back after ``back_s``."""
    key = (loss_s, model, in_use, away_s, back_s)
    known: float | None = tx.memo.get(key)
    if known is None:
        habit = tx.habits.rows.get(model)
        if in_use:  # its next request comes at once, and waits for what is in flight to end and for both loads
            asked, gone_s = 1.0, tx.drain_s.rows.get(model, 0.0) + away_s + back_s
        else:
            asked, gone_s = max(likely(habit, back_s, tx.now), expected(tx, model)), back_s
        known = tx.memo[key] = asked * gone_s * (1 + rate(habit, tx.now) * gone_s / 2)
    return known


def price(tx: Transaction, engines: Sequence[Engine], cost: float) -> float:
    """``cost``, or nothing where these engines are of no use until others are served (``deserted``): to keep them any
    longer gains nothing. The choice among several is still made by what they are worth, as they may be asked again
    after that."""
    return 0.0 if all(deserted(tx, engine) for engine in engines) else cost


def _least_load_s(tx: Transaction) -> float:
    """No busy engine is worth less than this and the time until its place is free again."""
    if _least_load_s not in tx.memo:
        known = (*tx.load_s.rows.values(), *tx.wake_s.rows.values())
        tx.memo[_least_load_s] = min((tx.policy.load_guess_s, *known))
    found: float = tx.memo[_least_load_s]
    return found


def because(tx: Transaction, asking: str, worth: float) -> str:
    """The clause of a decision."""
    if asking not in tx.queues.rows:
        return f"it is asked for; what goes is worth {worth:.0f} s of waiting"
    one = weight(tx, asking)
    who = "its waiter weighs" if one.waiters == 1 else f"its {one.waiters} waiters weigh"
    cost = f"evicting for it costs {worth:.0f} s" if math.isfinite(worth) else "nothing may be evicted for it"
    late = f", and it must load now to keep its bound of {one.bound_s:.0f} s" if one.overdue else ""
    return f"{who} {one.seconds:.0f} s, {cost}{late}"
