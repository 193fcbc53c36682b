"""Reports of the edge: outcomes of route commands, and counters."""

from __future__ import annotations

from serve.core.callers import ARRIVED_S
from serve.core.events import EdgeSeen, RouteClosed, RouteDrained, RouteOpened, RouteRefused
from serve.core.frozen import replace
from serve.core.habits import NOTED_EACH_S, PAUSE_S
from serve.core.state import Engine, RouteState, ready_at
from serve.core.transaction import Transaction


# --- facts ---
def route_opened(tx: Transaction, event: RouteOpened) -> None:
    """(1) it was being opened: open and up; (2) its engine is gone: the close that waited for this may be sent."""
    engine = tx.engines.rows.get(event.engine)
    if engine is not None and engine.route is RouteState.OPENING:  # (1)
        tx.set_engine(engine, route=RouteState.OPEN, up=True, refusals=0, retry_at=0.0, fresh_from=tx.now)
        tx.requested_until.drop(engine.model)
    _acknowledge_closing(tx, event.engine)  # (2)


def route_drained(tx: Transaction, event: RouteDrained) -> None:
    """Counters requested from now on show how much is left in flight."""
    engine = tx.engines.rows.get(event.engine)
    if engine is not None and engine.route is RouteState.DRAINING and not engine.drained:
        tx.set_engine(engine, drained=True, drained_idle=False, refusals=0, retry_at=0.0, fresh_from=tx.now)
    _acknowledge_closing(tx, event.engine)


def route_refused(tx: Transaction, event: RouteRefused) -> None:
    """(1) a close: retried later; (2) an open: retried later on the same server, as the outcome is unknown;
    (3) a drain: the route is open still; drain again later."""
    closing = tx.closing.rows.get(event.engine)
    if closing is not None:
        if closing.asked:  # (1)
            again = tx.now + 4 * tx.policy.route_retry_s
            tx.closing.put(closing.engine, replace(closing, asked=False, retry_at=again))
        else:
            _acknowledge_closing(tx, event.engine)
        return
    engine = tx.engines.rows.get(event.engine)
    if engine is None:
        return
    again = tx.now + tx.policy.route_retry_s * 2 ** min(engine.refusals, 6)
    if engine.route is RouteState.OPENING:  # (2)
        tx.set_engine(engine, route=RouteState.NONE, up=False, refusals=engine.refusals + 1, retry_at=again)
    elif engine.route is RouteState.DRAINING and not engine.drained:  # (3)
        tx.set_engine(engine, route=RouteState.OPEN, refusals=engine.refusals + 1, retry_at=again)


def route_closed(tx: Transaction, event: RouteClosed) -> None:
    tx.closing.drop(event.engine)


def _acknowledge_closing(tx: Transaction, engine: str) -> None:
    closing = tx.closing.rows.get(engine)
    if closing is not None and closing.pending:
        tx.closing.put(engine, replace(closing, pending=False))


def edge_seen(tx: Transaction, event: EdgeSeen) -> None:
    """The edge's counters: (1) unknown server or stale count: ignored; (2) up, in flight, last used; (3) a drained
    route with nothing in flight is quiet; (4) the model was used again (its waiters were noted when they came);
    (5) by others than the waiters that were released last: who asked it last is not known any more."""
    rows, habits, asked = tx.engines.rows, tx.habits.rows, tx.asked.rows
    own: dict[str, Engine] | None = None
    for seen in event.servers:  # for every engine of the fleet, every second: no call that can be spared
        engine = rows.get(seen.engine)
        if engine is None or engine.server is None or event.read_at < engine.fresh_from:  # (1)
            continue
        in_flight, queued, before = seen.in_flight, seen.queued, engine.last_used
        last_used = tx.now if in_flight or queued else seen.last_used
        if last_used > before:
            paused, habit = not engine.in_flight, habits.get(engine.model)
            long_ago = habit is None or last_used > habit.last + (PAUSE_S if paused else NOTED_EACH_S)
            if long_ago and last_used > ready_at(engine) + 1.0:  # (4)
                tx.note_use(engine.model, last_used, paused=paused)
                habits = tx.habits.rows
        else:
            last_used = before
        who = asked.get(engine.model) if asked else None
        if who is not None and (seen.last_used > who.at + ARRIVED_S or in_flight + queued > who.many):  # (5)
            tx.asked.drop(engine.model)
            asked = tx.asked.rows
        drained_idle = engine.drained and not in_flight and not queued  # (3)
        if (
            engine.in_flight != in_flight
            or before != last_used
            or engine.up is not seen.up
            or engine.queued != queued
            or engine.drained_idle is not drained_idle
        ):
            values = engine.__dict__.copy()  # (2) dataclasses.replace is slow
            values["up"], values["in_flight"], values["queued"] = seen.up, in_flight, queued
            values["last_used"], values["drained_idle"] = last_used, drained_idle
            changed = _new(Engine)
            _set(changed, "__dict__", values)
            own = tx.engines.own() if own is None else own
            own[engine.id] = changed


_new, _set = object.__new__, object.__setattr__
