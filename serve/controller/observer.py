"""Reads the edge's counters and turns them into events: all once a second, those waited for every 50 ms."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Protocol

from gateway_plugin.catalog import Catalog
from gateway_plugin.edge.runtime import EdgeRuntime, ServerStat
from gateway_plugin.errors import GatewayError
from serve.controller.stillness import Flow, flows, still
from serve.core.effects import Effect
from serve.core.engine_use import limit_of
from serve.core.events import EdgeSeen, Event, FoundServer, ServerSeen
from serve.core.policies.edge_sync import differences, names_wanted, repairs
from serve.core.state import EngineState, Fleet, RouteState

log = logging.getLogger("gateway.controller")

_ALL_S = 1.0
_CLOSELY_S = 0.05
_NOT_YET_S = 0.2


class Known(Protocol):
    """Gives access to the present fleet."""

    fleet: Fleet


def seen(fleet: Fleet, stats: Iterable[ServerStat], read_at: float, slots: Container[int] | None = None) -> EdgeSeen:
    """The edge's counters of the fleet's engines (of those in ``slots``, if given). Pure.

    ``read_at``: just before the query to the edge, by the controller's clock. An engine whose route should be open but
    whose server the edge does not list is reported as not up.
    """
    by_place = {(stat.slot, stat.server): stat for stat in stats}
    found = []
    for engine in fleet.engines.values():
        if engine.slot is None or engine.server is None or engine.route is RouteState.NONE:
            continue
        if slots is not None and engine.slot not in slots:
            continue
        stat = by_place.get((engine.slot, engine.server))
        if stat is None or stat.address != engine.address:
            found.append(ServerSeen(engine.id, up=False, in_flight=0, last_used=0.0))
        else:
            last_used = read_at - stat.idle_s if stat.idle_s >= 0 else 0.0
            found.append(ServerSeen(engine.id, stat.up, stat.in_flight, last_used, stat.queued))
    return EdgeSeen(tuple(found), read_at)


def found_servers(stats: Iterable[ServerStat]) -> tuple[FoundServer, ...]:
    """The edge's counters as the core's type."""
    return tuple(
        FoundServer(stat.slot, stat.server, stat.address, stat.up, stat.draining, stat.in_flight, stat.idle_s)
        for stat in stats
    )


async def edge_as_it_is(
    edge: EdgeRuntime, catalog: Catalog
) -> tuple[dict[str, int], frozenset[str], tuple[FoundServer, ...]]:
    """The catalog's models with a slot and those kept apart, and all servers; asks until the edge answers."""
    while True:
        try:
            await edge.adopt_keys()
            tenants = await edge.tenants()
            apart = await edge.apart()
            stats = await edge.servers()
        except (OSError, GatewayError) as error:
            log.warning("edge-not-yet", extra={"error": str(error)})
            await asyncio.sleep(_NOT_YET_S)
            continue
        names = {model.name for model in catalog.models}
        return {name: slot for name, slot in tenants.items() if name in names}, apart & names, found_servers(stats)


def limits(fleet: Fleet, stats: Iterable[ServerStat]) -> tuple[tuple[int, int, int], ...]:
    """(slot, server, limit) of each open route whose limit is another one at the edge. Pure.

    An edge that restarted has lost them (HAProxy's state file has no limits); the catalog may have changed too.
    """
    engines = {(e.slot, e.server, e.address): e for e in fleet.engines.values() if e.route is RouteState.OPEN}
    found = []
    for stat in stats:
        engine = engines.get((stat.slot, stat.server, stat.address))
        if engine is not None and engine.model in fleet.models and stat.limit != limit_of(fleet.models, engine):
            found.append((stat.slot, stat.server, limit_of(fleet.models, engine)))
    return tuple(found)


def stranded(stats: Iterable[ServerStat]) -> tuple[int, ...]:
    """Slots in which requests wait and no engine takes any: the last one died. Pure."""
    waiting = {stat.slot for stat in stats if stat.queued}
    return tuple(sorted(waiting - {stat.slot for stat in stats if stat.takes_requests}))


def watched(fleet: Fleet, now: float) -> frozenset[int]:
    """Slots whose counters are read often. Pure.

    (1) a route drains: its engine may stop as soon as nothing is in flight;
    (2) there are waiters, and an engine has not been seen in use since its own waiters were released: it can be evicted
    as soon as it has been, not only after the grace period of their requests.
    """
    grace_s = fleet.policy.first_use_grace_s
    slots = set()
    for engine in fleet.engines.values():
        unused = engine.last_used <= engine.granted_at and now < engine.granted_at + grace_s
        if engine.slot is not None and (
            engine.route is RouteState.DRAINING  # (1)
            or (fleet.waiters and engine.state is EngineState.READY and unused)  # (2)
        ):
            slots.add(engine.slot)
    return frozenset(slots)


class Observer:
    """Polls the edge; counts the requests sent to each model's engines."""

    def __init__(
        self,
        edge: EdgeRuntime,
        known: Known,
        post: Callable[[Event], None],
        mend: Callable[[tuple[Effect, ...]], None],
        clock: Callable[[], float],
        tell_still: Callable[[str, Mapping[str, int]], None],
    ) -> None:
        self._edge = edge
        self._known = known
        self._post = post
        self._mend = mend
        self._clock = clock
        self._tell_still = tell_still
        """Reports (node, engine -> in flight, or 0 if it sends again) to the node's agent."""
        self._flows: Mapping[str, Flow] = {}
        self._drift: frozenset[Effect] = frozenset()
        self._names_differ = False
        self.requests: dict[str, int] = {}
        """Model -> requests sent to its engines since this controller began."""
        self._totals: dict[tuple[int, int], int] = {}
        self.reachable = True

    async def watch_all(self) -> None:
        """All counters, once a second."""
        while True:
            await self._read(None)
            await asyncio.sleep(_ALL_S)

    async def watch_closely(self) -> None:
        """Counters that something waits for, every 50 ms."""
        while True:
            slots = watched(self._known.fleet, self._clock())
            if slots:
                await self._read(tuple(sorted(slots)))
            await asyncio.sleep(_CLOSELY_S)

    async def _read(self, slots: tuple[int, ...] | None) -> None:
        read_at = self._clock()
        try:
            stats = await self._edge.servers(slots)
            if slots is None:
                await self._compare_names()
                for slot, server, limit in limits(self._known.fleet, stats):
                    await self._edge.limit(slot, server, limit)
            for slot in stranded(stats):
                await self._edge.release(slot)
        except (OSError, GatewayError) as error:
            if self.reachable:  # one line a change, not one a second
                log.warning("edge-unreachable", extra={"error": str(error)})
            self.reachable = False
            return
        self.reachable = True
        fleet = self._known.fleet
        if slots is None:
            self._count(fleet, stats)
            self._compare(fleet, stats)
            before, self._flows = self._flows, flows(self._flows, fleet, stats, read_at)
            for node, engines in still(fleet, before, self._flows, read_at).items():
                self._tell_still(node, engines)
        event = seen(fleet, stats, read_at, slots)
        if event.servers:
            self._post(event)

    def _count(self, fleet: Fleet, stats: Iterable[ServerStat]) -> None:
        tenants = {slot: model for model, slot in fleet.slots.items()}
        for stat in stats:
            place = (stat.slot, stat.server)
            before, self._totals[place] = self._totals.get(place), stat.total
            if before is None or stat.slot not in tenants:
                continue
            more = stat.total - before if stat.total >= before else stat.total  # an edge that restarted counts from 0
            model = tenants[stat.slot]
            self.requests[model] = self.requests.get(model, 0) + more

    async def _compare_names(self) -> None:
        """Names and keys of the slots, like servers: sent again if the edge lacks them in two consecutive readings."""
        tenants, apart = await self._edge.tenants(), await self._edge.apart()
        keys = await self._edge.keys_in_force()
        fleet = self._known.fleet
        wanted = names_wanted(fleet)
        differ = fleet.settled and not (keys and tenants == wanted.names and apart == wanted.apart)
        if differ and self._names_differ:
            log.warning("edge-drift", extra={"names": wanted.names, "apart": sorted(wanted.apart), "keys": keys})
            self._mend((wanted,))
        self._names_differ = differ

    def _compare(self, fleet: Fleet, stats: tuple[ServerStat, ...]) -> None:
        servers = found_servers(stats)
        effects = repairs(self._drift, fleet, servers)
        self._drift = differences(fleet, servers)
        if effects:
            log.warning("edge-drift", extra={"effects": repr(effects)})
            self._mend(effects)
            self._drift = frozenset()
