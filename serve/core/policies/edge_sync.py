"""Differences between the edge and the fleet that must be repaired.

Both sides change during a reading, so a difference counts only if it lasts: ``repairs`` is given the differences of the
previous reading and returns effects only for those that are still there.
"""

from __future__ import annotations

from collections.abc import Iterable

from serve.core.effects import CloseRoute, DrainRoute, Effect, OpenRoute, SyncSlots
from serve.core.engine_use import limit_of
from serve.core.events import FoundServer
from serve.core.slots import slots_as_they_are
from serve.core.state import EngineState, Fleet, RouteState


def differences(fleet: Fleet, servers: Iterable[FoundServer]) -> frozenset[Effect]:
    """Effects that would make edge and fleet equal, from one reading.

    (1) a server that is open at the edge, belongs to no engine and is not being closed: close it;
    (2) an engine whose route is open in the fleet and whose server the edge does not have, or drains: open it again;
    (3) one whose drain the edge accepted and that still gets requests: drain it again.
    """
    if not fleet.settled:
        return frozenset()
    wanted = {}
    for engine in fleet.engines.values():
        if engine.slot is not None and engine.server is not None:  # a refused route keeps its place for the next try
            wanted[(engine.slot, engine.server)] = engine
    closing = {(route.slot, route.server) for route in fleet.closing.values()}
    found = {(server.slot, server.server): server for server in servers}
    effects: set[Effect] = set()
    for slot, index in found:
        if (slot, index) not in wanted and (slot, index) not in closing:  # (1)
            effects.add(CloseRoute(f"unknown-slot{slot}-e{index}", slot, index))
    for (slot, index), engine in wanted.items():
        there = found.get((slot, index))
        closed = there is None or there.address != engine.address or there.draining
        if closed and engine.state is EngineState.READY and engine.route is RouteState.OPEN:  # (2)
            effects.add(OpenRoute(engine.id, slot, index, engine.address, limit_of(fleet.models, engine)))
        if there is not None and not there.draining and engine.route is RouteState.DRAINING and engine.drained:  # (3)
            effects.add(DrainRoute(engine.id, slot, index))
    return frozenset(effects)


def repairs(before: frozenset[Effect], fleet: Fleet, servers: Iterable[FoundServer]) -> tuple[Effect, ...]:
    """The differences that were there the last time and still are, in a stable order."""
    return tuple(sorted(before & differences(fleet, servers), key=repr))


def names_wanted(fleet: Fleet) -> SyncSlots:
    """The edge's desired names and slots."""
    return slots_as_they_are(fleet.models, fleet.slots, fleet.apart)
