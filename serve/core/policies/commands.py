"""Commands to edge and agents that engine states call for."""

from __future__ import annotations

from dataclasses import replace

from serve.core.effects import CloseRoute, DrainRoute, OpenRoute, StopEngine
from serve.core.engine_use import drain_is_over, limit_of
from serve.core.room import loads_beside
from serve.core.sleep_room import MAY_SLEEP, may_sleep, most_mib, room_for_sleep
from serve.core.slots import slots_as_they_are
from serve.core.state import Action, Engine, EngineState, RouteState
from serve.core.transaction import Transaction
from serve.core.transitions import begin_sleep, begin_stop, close_route, may_open


def reconcile(tx: Transaction) -> None:
    """Send the commands that the engines' states require (only after the fleet settled):

    (1) READY without a route: open it, when its slot has a free server, the route that it had before it slept is
        closed (both outcomes name the engine alone), and the last refusal and the death of another engine are long
        enough ago
        (an open or drain without any outcome is taken for lost at last, and sent again);
    (2) DRAINING: drain an open route; put it to sleep or stop it when the edge reported nothing in flight, or stop it
        at the deadline, and nothing loads, falls asleep or wakes on its GPUs;
    (3) STOPPING: close its route, stop it at the agent (once nothing loads on its GPUs), again when no outcome comes;
    (4) routes of engines that are gone: close.
    """
    if tx.slots_changed:
        tx.emit(slots_as_they_are(tx.models, tx.slots.rows, tx.apart.rows, tx.fresh_slots))
    moving = tx.moving.rows  # visited in the order of the engines, in which the commands are sent
    for engine in [one for one in tx.engines.rows.values() if one.id in moving] if moving else ():
        if engine.state is EngineState.READY:
            if engine.route in (RouteState.NONE, RouteState.OPENING) and tx.now >= engine.retry_at:
                _open(tx, engine)  # (1)
        elif engine.state is EngineState.DRAINING:
            _drain(tx, engine)  # (2)
        elif engine.state is EngineState.STOPPING:
            _stop(tx, engine)  # (3)
    for closing in list(tx.closing.rows.values()):  # (4)
        lost = tx.now >= closing.since + 2 * tx.policy.command_retry_s
        if not closing.asked and tx.now >= closing.retry_at and (lost or not closing.pending):
            tx.closing.put(closing.engine, replace(closing, asked=True, pending=False))
            tx.emit(CloseRoute(closing.engine, closing.slot, closing.server))


def _open(tx: Transaction, engine: Engine) -> None:
    if engine.slot is None or engine.id in tx.closing.rows or not may_open(tx, engine.model):
        return
    server = engine.server
    if server is None:
        taken = {c.server for c in tx.closing.rows.values() if c.slot == engine.slot}
        taken |= {e.server for e in tx.engines.rows.values() if e.slot == engine.slot and e.server is not None}
        server = next((index for index in range(tx.policy.servers_per_slot) if index not in taken), None)
        if server is None:
            return
    tx.set_engine(engine, route=RouteState.OPENING, server=server, retry_at=_lost_at(tx))
    tx.emit(OpenRoute(engine.id, engine.slot, server, engine.address, limit_of(tx.models, engine)))


def _lost_at(tx: Transaction) -> float:
    return tx.now + 2 * tx.policy.command_retry_s


def _drain(tx: Transaction, engine: Engine) -> None:
    if engine.server is None or engine.slot is None:
        _stop(tx, tx.set_engine(engine, state=EngineState.STOPPING, since=tx.now, stop_sent=False))
        return
    if drain_is_over(tx, engine) and tx.reachable(engine) and _may_stop(tx, engine):
        took_s = tx.now - engine.since
        if engine.model in tx.models and (took_s > 1.0 or engine.model in tx.drain_s.rows):
            tx.drain_s.put(engine.model, max(took_s, 0.8 * tx.drain_s.rows.get(engine.model, 0.0)))
        if engine.stop_reason not in MAY_SLEEP or not may_sleep(tx, engine) or not _sleep(tx, engine):
            _stop(tx, tx.set_engine(engine, state=EngineState.STOPPING, since=tx.now, stop_sent=False))
    elif not engine.drained and tx.now >= engine.retry_at:
        tx.set_engine(engine, route=RouteState.DRAINING, drained_idle=False, retry_at=_lost_at(tx))
        tx.emit(DrainRoute(engine.id, engine.slot, engine.server))


def _sleep(tx: Transaction, engine: Engine) -> bool:
    """Put it to sleep, or stop others that sleep and wait for their host memory; ``False``: there is none for it."""
    less_valuable = room_for_sleep(tx, engine)
    if less_valuable is None:
        because = "its node's host memory is held by engines that are worth more, awake ones among them"
        tx.decide(Action.STOP, engine.model, because, engine=engine.id)
        return False
    for other in less_valuable:
        _stop(tx, begin_stop(tx, other, "sleep-memory"))
        because = f"'{engine.model}' needs the host memory in which it sleeps, and is worth more"
        tx.decide(Action.STOP, other.model, because, engine=other.id, other=engine.model)
    needed_mib = engine.sleep_mib if engine.slept else most_mib(tx.models[engine.model])
    if engine.slept or needed_mib <= tx.nodes.rows[engine.node].free_sleep_mib:
        begin_sleep(tx, engine, needed_mib)
    return True


def _may_stop(tx: Transaction, engine: Engine) -> bool:
    others = {other for part in engine.parts if part.gpus for other in tx.nodes.rows[part.node].engines}
    return loads_beside(engine, (tx.engines.rows[other] for other in others)) is None


def _stop(tx: Transaction, engine: Engine) -> None:
    engine = close_route(tx, engine)
    again = engine.stop_sent and tx.now >= engine.since + tx.policy.command_retry_s
    first = not engine.stop_sent and _may_stop(tx, engine)
    if (again or first) and tx.reachable(engine):
        tx.set_engine(engine, stop_sent=True, since=tx.now)
        tx.emit(StopEngine(engine.id, engine.node, tx.epoch, engine.stop_reason))
