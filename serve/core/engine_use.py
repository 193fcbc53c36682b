"""How an engine is used: idle, unclaimed, abandoned, drained, surplus; whether it needs a replacement; its limit."""

from __future__ import annotations

from collections.abc import Mapping

from gateway_plugin.catalog import Model
from serve.core.state import (
    Engine,
    EngineState,
    NodePhase,
    RouteState,
    had_requests,
    live,
    ready_at,
    serving,
    stalled,
)
from serve.core.transaction import Transaction


def limit_of(models: Mapping[str, Model], engine: Engine) -> int:
    """Requests that the edge should send to ``engine`` at a time; 0: no limit."""
    model = models.get(engine.model)
    return model.requests_at_a_time if model else 0


def idle(tx: Transaction, engine: Engine) -> bool:
    """Nothing is in flight on it, and no request that was just released to it can be on its way."""
    return (
        engine.state is EngineState.READY
        and engine.route is not RouteState.OPENING
        and engine.in_flight == 0
        and (
            engine.last_used > engine.granted_at
            or tx.now >= engine.granted_at + tx.policy.first_use_grace_s
        )
    )  # fmt: skip


def abandoned(tx: Transaction, engine: Engine) -> bool:
    """It loads, and has had no demand for a while; but a load more than half done is finished, or two models whose
    clients give up too early would stop each other for ever."""
    if engine.state is not EngineState.LOADING or engine.unwanted_since is None:
        return False
    spent_s, expected_s = tx.now - engine.started, tx.load_time_s(engine.model)
    nearly_done = expected_s / 2 <= spent_s < 2 * expected_s
    return not nearly_done and tx.now >= engine.unwanted_since + tx.policy.abandoned_load_grace_s


def unclaimed(tx: Transaction, engine: Engine) -> bool:
    """It loads, or loaded a short while ago, and has had no request yet."""
    return engine.state is EngineState.LOADING or (
        not had_requests(engine) and tx.now < ready_at(engine) + tx.policy.unclaimed_s
    )


def may_go(tx: Transaction, engine: Engine, *, busy: bool = False) -> bool:
    """No demand for its model (a pin is demand) or its model can spare it; on nodes that take commands; resident for
    long enough and idle, stalled or (``busy``) in use; or a load whose waiters have all left; or one that sleeps, whose
    stop frees what it kept of its GPUs."""
    spare = engine.model in tx.spreads.rows and surplus(tx, engine)
    if engine.in_flight and not (busy or spare) and engine.stalled_since is None:
        return False  # the fast path for a busy engine
    if tx.wanted(engine.model) and not spare:
        return False
    if engine.state is not EngineState.READY:
        return (engine.state is EngineState.ASLEEP or abandoned(tx, engine)) and _up(tx, engine)
    served = engine.route is RouteState.OPEN if busy or spare else idle(tx, engine)
    if not (served or stalled(engine)):
        return False
    model = tx.models.get(engine.model)
    resident = model is None or tx.now >= ready_at(engine) + model.min_residency_s
    return resident and _up(tx, engine)


def _up(tx: Transaction, engine: Engine) -> bool:
    nodes = tx.nodes.rows
    for part in engine.parts:  # noqa: SIM110 - for each engine of the fleet, while models wait
        if nodes[part.node].phase is not NodePhase.UP:
            return False
    return True


def needs_replacement(tx: Transaction, engine: Engine) -> bool:
    """Its model is wanted, something is in flight, or it was used recently or is about to be."""
    policy = tx.policy
    return (
        engine.in_flight > 0
        or tx.wanted(engine.model)
        or tx.now < engine.last_used + policy.handover_used_s
        or (engine.state is EngineState.READY and tx.now < engine.granted_at + policy.first_use_grace_s)
    )


def staying(tx: Transaction, model: str) -> list[Engine]:
    """Its engines that serve or load, on nodes whose end is not near."""
    return [engine for engine in tx.engines_of(model) if live(engine) and not tx.ending(engine)]


def needed_engines(tx: Transaction, model: str) -> int:
    """How many engines a model needs as long as it has any."""
    spread = tx.spreads.rows.get(model)
    return 1 if spread is None else spread.wanted


def least_loaded(engines: list[Engine], count: int) -> list[Engine]:
    """The ``count`` engines of one model that it can spare best: those that do not serve, then those with the fewest
    requests, then the youngest; never the last one."""
    best = sorted(
        engines, key=lambda one: (serving(one), one.in_flight + one.queued, -one.started, one.id)
    )  # fmt: skip
    return best[: max(0, min(count, len(engines) - 1))]


def surplus(tx: Transaction, engine: Engine) -> bool:
    """Its model has been able to do without it for ``replica_rise_s``, with a reserve: a better victim than the only
    engine of another model. Pins and waiters of its model, which keeps others, do not count."""
    spread = tx.spreads.rows.get(engine.model)
    if spread is None or not live(engine):
        return False
    enough = spread.wanted
    if spread.towards < enough and tx.now >= spread.since + tx.policy.replica_rise_s:
        enough = spread.towards
    engines = staying(tx, engine.model)
    return engine in least_loaded(engines, len(engines) - enough)


def drain_is_over(tx: Transaction, engine: Engine) -> bool:
    """Whether the edge reported nothing in flight on a draining engine, or its deadline has passed."""
    return engine.drained_idle or tx.now >= _drain_deadline(tx, engine)


def _drain_deadline(tx: Transaction, engine: Engine) -> float:
    """When requests in flight are cut: (1) the end of one of its nodes makes it drain: when that leaves; (2) else
    after ``drain_timeout_s``, or when the node leaves before that. Never before ``leave_grace_s`` of draining."""
    nodes = tx.nodes_of(engine)
    model = tx.models.get(engine.model)
    deadline = engine.since + (model.drain_timeout_s if model else _DRAIN_TIMEOUT_S)
    leaves = [node.leave_at for node in nodes if node.leave_at is not None]
    if not leaves:
        return deadline
    leave_at = max(min(leaves), engine.since + tx.policy.leave_grace_s)
    ends = engine.stop_reason == "handed-over" or any(n.drain_at is not None and tx.now >= n.drain_at for n in nodes)
    return leave_at if ends else min(deadline, leave_at)  # (1), (2)


_DRAIN_TIMEOUT_S = 600.0
"""Drain timeout of an engine whose model has left the catalog."""
