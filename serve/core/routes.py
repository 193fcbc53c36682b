"""Slots and routes: which model is in which slot, and how an engine's route opens, drains and closes.

A handler states a fact (an outcome, a count); ``reconcile`` then sends what follows. At most one route command is under
way for an engine: an open is not overtaken by a drain, nor a drain by a close, whatever the edge's delays.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from gateway_plugin.catalog import Model
from serve.core.apart import may_open
from serve.core.beside import loads_beside
from serve.core.change import Change
from serve.core.effects import CloseRoute, DrainRoute, OpenRoute, StopEngine, SyncSlots
from serve.core.events import EdgeSeen, RouteClosed, RouteDrained, RouteOpened, RouteRefused
from serve.core.fleet import ClosingRoute, Engine, EngineState, RouteState

_DRAIN_TIMEOUT_S = 600.0
"""Of an engine whose model has left the catalog."""


# --- facts ---
def route_opened(change: Change, event: RouteOpened) -> None:
    """(1) it was being opened: open and up; (2) its engine is gone: the close that waited for this may go."""
    engine = change.engines.rows.get(event.engine)
    if engine is not None and engine.route is RouteState.OPENING:  # (1)
        change.set_engine(engine, route=RouteState.OPEN, up=True, refusals=0, retry_at=0.0, fresh_from=change.now)
        change.wished.drop(engine.model)
    _acknowledge_closing(change, event.engine)  # (2)


def route_drained(change: Change, event: RouteDrained) -> None:
    """Counters asked for from now on tell what is left in flight."""
    engine = change.engines.rows.get(event.engine)
    if engine is not None and engine.route is RouteState.DRAINING and not engine.drained:
        change.set_engine(engine, drained=True, quiet=False, refusals=0, retry_at=0.0, fresh_from=change.now)
    _acknowledge_closing(change, event.engine)


def route_refused(change: Change, event: RouteRefused) -> None:
    """(1) a close: again later; (2) an open: again later, as what it was is unknown, over the same server;
    (3) a drain: the route is open still; drain again later."""
    closing = change.closing.rows.get(event.engine)
    if closing is not None:
        if closing.asked:  # (1)
            again = change.now + 4 * change.policy.route_retry_s
            change.closing.put(closing.engine, replace(closing, asked=False, retry_at=again))
        else:
            _acknowledge_closing(change, event.engine)
        return
    engine = change.engines.rows.get(event.engine)
    if engine is None:
        return
    again = change.now + change.policy.route_retry_s * 2 ** min(engine.refusals, 6)
    if engine.route is RouteState.OPENING:  # (2)
        change.set_engine(engine, route=RouteState.NONE, up=False, refusals=engine.refusals + 1, retry_at=again)
    elif engine.route is RouteState.DRAINING and not engine.drained:  # (3)
        change.set_engine(engine, route=RouteState.OPEN, refusals=engine.refusals + 1, retry_at=again)


def route_closed(change: Change, event: RouteClosed) -> None:
    change.closing.drop(event.engine)


def _acknowledge_closing(change: Change, engine: str) -> None:
    closing = change.closing.rows.get(engine)
    if closing is not None and closing.pending:
        change.closing.put(engine, replace(closing, pending=False))


def edge_seen(change: Change, event: EdgeSeen) -> None:
    """The edge's counters: (1) unknown server or stale count: ignored; (2) up, in flight, last used; (3) a drained
    route with nothing in flight is quiet."""
    rows = change.engines.rows
    for seen in event.servers:
        engine = rows.get(seen.engine)
        if engine is None or engine.server is None or event.read_at < engine.fresh_from:  # (1)
            continue
        last_used = max(engine.last_used, change.now if seen.in_flight else seen.last_used)
        quiet = engine.drained and seen.in_flight == 0  # (3)
        if (engine.up, engine.in_flight, engine.last_used, engine.quiet) != (seen.up, seen.in_flight, last_used, quiet):
            # (2) not dataclasses.replace: this runs for every busy engine of the fleet, every second
            changed = object.__new__(Engine)
            changed.__dict__.update(
                engine.__dict__, up=seen.up, in_flight=seen.in_flight, last_used=last_used, quiet=quiet
            )
            change.engines.put(engine.id, changed)


def doubt(change: Change, model: str) -> None:
    """The edge had no usable server where an ingress was told to go: not up until the edge says so again."""
    for engine in change.engines_of(model):
        if engine.route is RouteState.OPEN:
            change.set_engine(engine, up=False, fresh_from=change.now)


# --- what an engine is to become; commands follow in ``reconcile`` ---
def retire(change: Change, engine: Engine, reason: str) -> Engine:
    """Let an engine go: (1) it goes already; (2) no request can have reached it: stop; (3) drain its route first."""
    if engine.state is EngineState.STOPPING:  # (1)
        return engine
    if engine.state is EngineState.DRAINING:
        return change.set_engine(engine, stop_reason=reason)
    if engine.server is None:  # (2)
        return change.set_engine(
            engine, state=EngineState.STOPPING, since=change.now, stop_reason=reason, stop_sent=False
        )
    return change.set_engine(  # (3)
        engine, state=EngineState.DRAINING, since=change.now, stop_reason=reason, drained=False, quiet=False
    )


def can_take_back(engine: Engine) -> bool:
    """It drains for a reason that its own model may overrule, and no stop was sent."""
    return engine.state is EngineState.DRAINING and engine.stop_reason in ("evicted", "idle", "handed-over")


def take_back(change: Change, engine: Engine) -> bool:
    """Undo a drain: (1) not sent yet: nothing to do; (2) acknowledged: open the route again; (3) under way: not now."""
    if engine.route is RouteState.DRAINING:
        if not engine.drained:  # (3)
            return False
        engine = change.set_engine(engine, route=RouteState.NONE, up=False, refusals=0, retry_at=0.0)  # (2)
    change.set_engine(  # (1)
        engine, state=EngineState.READY, since=change.now, stop_reason="", drained=False, quiet=False,
        answered_at=change.now,
    )  # fmt: skip
    return True


def close_route(change: Change, engine: Engine) -> Engine:
    """Its server goes to ``maint``, as soon as no earlier command for it is under way. No-op without a server."""
    if engine.server is None or engine.slot is None:
        return engine
    under_way = engine.route is RouteState.OPENING or (engine.route is RouteState.DRAINING and not engine.drained)
    change.closing.put(
        engine.id, ClosingRoute(engine.id, engine.slot, engine.server, since=change.now, pending=under_way)
    )
    return change.set_engine(engine, route=RouteState.NONE, server=None, up=False, in_flight=0)


# --- commands ---
def slots_as_they_are(
    models: Mapping[str, Model], slots: Mapping[str, int], apart: Collection[str], fresh: tuple[int, ...] = ()
) -> SyncSlots:
    """Slots and the models kept apart, under all names of each model, for the edge."""
    names = {name: slot for model, slot in sorted(slots.items()) for name in models[model].names}
    kept_apart = frozenset(name for model in slots.keys() & set(apart) for name in models[model].names)
    return SyncSlots(names, fresh, kept_apart)


def reconcile(change: Change) -> None:
    """Send what the engines' states ask of edge and agents (only after the fleet settled):

    (1) READY without a route: open it, when its slot has a free server, a refusal is long enough ago, and so is the
        death of another one
        (an open or drain without any outcome is taken for lost at last, and sent again);
    (2) DRAINING: drain an open route; stop when the edge said that nothing is in flight, or at the deadline, and
        nothing loads on its GPUs;
    (3) STOPPING: close its route, tell the agent (once nothing loads on its GPUs), tell it again when no outcome comes;
    (4) routes of engines that are gone: close.
    """
    if change.slots_changed:
        change.emit(slots_as_they_are(change.models, change.slots.rows, change.apart.rows, change.fresh_slots))
    for engine in list(change.engines.rows.values()):
        if engine.state is EngineState.READY:
            if engine.route in (RouteState.NONE, RouteState.OPENING) and change.now >= engine.retry_at:
                _open(change, engine)  # (1)
        elif engine.state is EngineState.DRAINING:
            _drain(change, engine)  # (2)
        elif engine.state is EngineState.STOPPING:
            _stop(change, engine)  # (3)
    for closing in list(change.closing.rows.values()):  # (4)
        lost = change.now >= closing.since + 2 * change.policy.command_retry_s
        if not closing.asked and change.now >= closing.retry_at and (lost or not closing.pending):
            change.closing.put(closing.engine, replace(closing, asked=True, pending=False))
            change.emit(CloseRoute(closing.engine, closing.slot, closing.server))


def _open(change: Change, engine: Engine) -> None:
    if engine.slot is None or not may_open(change, engine.model):
        return
    server = engine.server
    if server is None:
        taken = {c.server for c in change.closing.rows.values() if c.slot == engine.slot}
        taken |= {e.server for e in change.engines.rows.values() if e.slot == engine.slot and e.server is not None}
        server = next((index for index in range(change.policy.servers_per_slot) if index not in taken), None)
        if server is None:
            return
    change.set_engine(engine, route=RouteState.OPENING, server=server, retry_at=_lost_at(change))
    change.emit(OpenRoute(engine.id, engine.slot, server, engine.address))


def _lost_at(change: Change) -> float:
    return change.now + 2 * change.policy.command_retry_s


def _drain(change: Change, engine: Engine) -> None:
    if engine.server is None or engine.slot is None:
        _stop(change, change.set_engine(engine, state=EngineState.STOPPING, since=change.now, stop_sent=False))
        return
    if drain_is_over(change, engine) and change.reachable(engine) and _may_stop(change, engine):
        _stop(change, change.set_engine(engine, state=EngineState.STOPPING, since=change.now, stop_sent=False))
    elif not engine.drained and change.now >= engine.retry_at:
        change.set_engine(engine, route=RouteState.DRAINING, quiet=False, retry_at=_lost_at(change))
        change.emit(DrainRoute(engine.id, engine.slot, engine.server))


def drain_is_over(change: Change, engine: Engine) -> bool:
    """Whether the edge said that nothing is in flight on a draining engine, or its deadline has passed."""
    return engine.quiet or change.now >= _drain_deadline(change, engine)


def _may_stop(change: Change, engine: Engine) -> bool:
    others = change.nodes.rows[engine.node].engines if engine.gpus else ()
    return loads_beside(engine, (change.engines.rows[other] for other in others)) is None


def _drain_deadline(change: Change, engine: Engine) -> float:
    """When what is in flight is cut: (1) its node's end makes it drain: when the node leaves; (2) else after
    ``drain_timeout_s``, or when the node leaves before that. ``leave_grace_s`` is given always."""
    node = change.nodes.rows[engine.node]
    model = change.models.get(engine.model)
    deadline = engine.since + (model.drain_timeout_s if model else _DRAIN_TIMEOUT_S)
    if node.leave_at is None:
        return deadline
    leave_at = max(node.leave_at, engine.since + change.policy.leave_grace_s)
    ends = engine.stop_reason == "handed-over" or (node.drain_at is not None and change.now >= node.drain_at)
    return leave_at if ends else min(deadline, leave_at)  # (1), (2)


def _stop(change: Change, engine: Engine) -> None:
    engine = close_route(change, engine)
    again = engine.stop_sent and change.now >= engine.since + change.policy.command_retry_s
    first = not engine.stop_sent and _may_stop(change, engine)
    if (again or first) and change.reachable(engine):
        change.set_engine(engine, stop_sent=True, since=change.now)
        change.emit(StopEngine(engine.id, engine.node, change.epoch, engine.generation, engine.stop_reason))


# --- slots ---
def slots_in_use(change: Change) -> set[int]:
    """Slots with an engine or a server, whoever has them."""
    in_use = {closing.slot for closing in change.closing.rows.values()}
    return in_use | {engine.slot for engine in change.engines.rows.values() if engine.slot is not None}


def free_slot(change: Change, model: str, in_use: set[int]) -> int | None:
    """The slot ``model`` may have: (1) its own; (2) one that nobody has; (3) one whose model has no engine, rather one
    that nobody wants; (4) none. A slot with any engine or server of an earlier tenant is in use."""
    slot = change.slots.rows.get(model)
    if slot is not None:  # (1)
        return slot
    tenants = {slot: tenant for tenant, slot in change.slots.rows.items()}
    free = (index for index in range(change.policy.slots) if index not in in_use)
    return min(  # (2), (3), (4)
        free, key=lambda index: (1 + change.wanted(tenants[index]) if index in tenants else 0, index), default=None
    )


def take_slot(change: Change, model: str, slot: int) -> None:
    """Make ``slot``, as found by ``free_slot``, that of ``model``; a new tenant means a new engine key."""
    if change.slots.rows.get(model) == slot:
        return
    for tenant, taken in list(change.slots.rows.items()):
        if taken == slot:
            change.slots.drop(tenant)
    change.slots.put(model, slot)
    change.slots_changed = True
    change.fresh_slots = (*change.fresh_slots, slot)
