"""How many engines a model should have: none without demand, and by its load up to ``replicas_max``."""

from __future__ import annotations

from serve.core.engine_use import least_loaded, staying
from serve.core.room import Need, holds, need_of
from serve.core.spread import advance, engines_for
from serve.core.state import Action, Engine, NodePhase, live
from serve.core.transaction import Transaction
from serve.core.transitions import begin_stop


def wanted_replicas(tx: Transaction, model: str) -> int:
    """(1) 1 while there is demand for ``model`` (waiters, a pin, a request to load it), else 0; (2) once it has one,
    as many as its load calls for (``Spread.wanted``); (3) but no more than it has while a model without an engine waits
    that a node which could take this one could hold."""
    demand = int(tx.wanted(model) or tx.unattended(model))  # (1)
    spread = tx.spreads.rows.get(model)
    if spread is None or spread.wanted == 1 or not any(map(live, tx.engines_of(model))):
        return demand
    have = len(staying(tx, model))
    if spread.wanted > have and _wanted_on(tx, need_of(tx.models[model]), _starving_once(tx)):  # (3)
        return max(demand, have, 1)
    return max(demand, spread.wanted)  # (2)


def short(tx: Transaction) -> tuple[str, ...]:
    """Models that have an engine and need more, by name."""
    some = [model for model, spread in tx.spreads.rows.items() if spread.wanted > 1 and model in tx.models]
    return tuple(
        model
        for model in sorted(some)
        if any(map(live, tx.engines_of(model))) and tx.deficit(model, replaced=True) > 0
    )  # fmt: skip


def review(tx: Transaction) -> None:
    """What each model's load calls for, and the drain of engines above that.

    The load is what is in flight and queued on its engines, and who waits for it. (1) A model without an engine waits
    that the node of one to be spared could hold: that goes after seconds, not minutes. (2) The least loaded ones drain,
    never the last.
    """
    for name, spread in list(tx.spreads.rows.items()):
        model, policy = tx.models[name], tx.policy
        engines = staying(tx, name)
        load = _load(tx, name)
        rise = engines_for(load, model.replica_target, model.replicas_max)
        fall = engines_for(load, model.replica_target * policy.replica_reserve, model.replicas_max)
        fall_s = policy.replica_fall_s
        if fall < spread.wanted and len(engines) > 1:  # (1)
            waiting = _starving(tx)
            spared = least_loaded(engines, len(engines) - fall)
            if waiting and any(_makes_room(tx, engine, need) for engine in spared for need in waiting):
                fall_s = policy.replica_rise_s
        after = advance(
            spread, len(engines), rise, fall, tx.now, rise_s=policy.replica_rise_s, fall_s=fall_s
        )  # fmt: skip
        if after is not spread:
            tx.spreads.put(name, after)
        said = f"{load} requests in flight and waiting, {model.replica_target:g} for each engine"
        if after.wanted > max(spread.wanted, len(engines)):
            tx.decide(Action.LOAD, name, f"{said}: {after.wanted} engines are wanted")
        if len(engines) > after.wanted:
            for engine in least_loaded(engines, len(engines) - after.wanted):  # (2)
                if tx.reachable(engine):
                    tx.decide(Action.STOP, name, f"{said}: {after.wanted} of them would do", engine=engine.id)
                    begin_stop(tx, engine, "surplus")
        if model.replicas_max == 1 and len(engines) <= 1:
            tx.spreads.drop(name)


def _load(tx: Transaction, model: str) -> int:
    waiters = tx.waiters.rows
    waiting = sum(not waiters[ticket].unattended for ticket in tx.queues.rows.get(model, ()))
    return waiting + sum(engine.in_flight + engine.queued for engine in tx.engines_of(model) if live(engine))


def _starving(tx: Transaction) -> list[Need]:
    """The needs of models that are wanted, have no engine, do not back off, and have weights."""
    needs = []
    for model in {*tx.queues.rows, *tx.pinned, *tx.requested_until.rows} & tx.models.keys():
        failure = tx.failures.rows.get(model)
        if failure is not None and tx.now < failure.retry_at:
            continue
        if model in tx.weights.rows:
            continue
        if tx.wanted(model) and not any(map(live, tx.engines_of(model))):
            needs.append(need_of(tx.models[model]))
    return needs


def _starving_once(tx: Transaction) -> list[Need]:
    """As first seen by placement in this step, which asks for each model."""
    if _starving_once not in tx.memo:
        tx.memo[_starving_once] = list(dict.fromkeys(_starving(tx)))
    found: list[Need] = tx.memo[_starving_once]
    return found


def _wanted_on(tx: Transaction, mine: Need, others: list[Need]) -> bool:
    """Some node could hold this need and one of the others."""
    return bool(others) and any(
        node.phase is NodePhase.UP and holds(node, mine) and any(holds(node, need) for need in others)
        for node in tx.nodes.rows.values()
    )


def _makes_room(tx: Transaction, engine: Engine, need: Need) -> bool:
    on_gpus = any(part.gpus for part in engine.parts)
    return on_gpus == (need.gpus > 0) and any(
        node.phase is NodePhase.UP and holds(node, need) for node in tx.nodes_of(engine)
    )  # fmt: skip
