"""From the edge's counters to events: pure parts of the observer, and what edge and fleet owe each other."""

from __future__ import annotations

from dataclasses import replace

from gateway_plugin.catalog import Model
from gateway_plugin.edge.runtime import ServerStat
from serve.controller.observer import found_servers, limits, seen, stranded, watched
from serve.core.effects import CloseRoute, OpenRoute
from serve.core.events import Part
from serve.core.policies.edge_sync import differences, repairs
from serve.core.policy import Policy
from serve.core.state import Engine, EngineState, Fleet, RouteState, Waiter

ENGINE = Engine(
    id="e1", model="m", parts=(Part("n", (), 1),), state=EngineState.READY, since=0.0, started=0.0,
    address="127.0.0.1:9", slot=3, route=RouteState.OPEN, server=2, up=True,
)  # fmt: skip
FLEET = Fleet(
    Policy(), models={"m": Model(name="m", source="x", memory_gib=1)}, engines={"e1": ENGINE}, slots={"m": 3},
    settled=True,
)  # fmt: skip
SERVER = ServerStat(slot=3, server=2, address="127.0.0.1:9", up=True, draining=False, in_flight=4, idle_s=10.0, total=7)


def test_counters_become_last_used_and_in_flight() -> None:
    (found,) = seen(FLEET, [SERVER], 100.0).servers
    assert (found.engine, found.up, found.in_flight, found.last_used) == ("e1", True, 4, 90.0)


def test_what_waits_for_a_server_is_not_in_flight_on_it() -> None:
    (found,) = seen(FLEET, [replace(SERVER, queued=7)], 100.0).servers
    assert (found.in_flight, found.queued) == (4, 7)


def test_a_queue_is_stranded_where_no_engine_takes_requests() -> None:
    waits = replace(SERVER, queued=2)
    assert stranded([waits]) == ()
    assert stranded([replace(waits, up=False), replace(waits, server=1, draining=True)]) == (3,)
    assert stranded([replace(waits, up=False), replace(SERVER, server=1)]) == ()
    assert stranded([replace(SERVER, up=False)]) == ()


def test_a_limit_that_the_edge_lost_is_set_again() -> None:
    assert limits(FLEET, [SERVER]) == ((3, 2, 128),), "vLLM's default without a GPU"
    assert limits(FLEET, [replace(SERVER, limit=128)]) == ()
    few = replace(FLEET, models={"m": Model(name="m", source="x", memory_gib=1, concurrency=3)})
    assert limits(few, [replace(SERVER, limit=128)]) == ((3, 2, 3),)
    assert limits(FLEET, [replace(SERVER, address="127.0.0.1:10"), replace(SERVER, slot=1)]) == ()
    drains = replace(FLEET, engines={"e1": replace(ENGINE, route=RouteState.DRAINING)})
    assert limits(drains, [SERVER]) == ()


def test_a_server_never_used_has_no_last_use() -> None:
    (found,) = seen(FLEET, [replace(SERVER, idle_s=-1)], 100.0).servers
    assert found.last_used == 0.0


def test_an_engine_that_the_edge_does_not_have_is_not_up() -> None:
    for stats in ([], [replace(SERVER, address="127.0.0.1:10")], [replace(SERVER, server=1)]):
        (found,) = seen(FLEET, stats, 100.0).servers
        assert not found.up


def test_draining_routes_are_watched_closely() -> None:
    assert watched(FLEET, 100.0) == frozenset()
    assert watched(replace(FLEET, engines={"e1": replace(ENGINE, route=RouteState.DRAINING)}), 100.0) == {3}


def test_an_engine_not_seen_in_use_yet_is_watched_while_somebody_waits_and_its_grace_lasts() -> None:
    waiting = replace(FLEET, waiters={"t": Waiter("t", "other", 0.0, 9.0)})
    fresh = {"e1": replace(ENGINE, granted_at=99.0)}
    assert watched(replace(waiting, engines=fresh), 100.0) == {3}
    assert watched(replace(waiting, engines=fresh), 99.0 + Policy().first_use_grace_s) == frozenset()
    assert watched(replace(FLEET, engines=fresh), 100.0) == frozenset()
    assert (
        watched(replace(waiting, engines={"e1": replace(ENGINE, granted_at=99.0, last_used=99.5)}), 100.0)
        == frozenset()
    )


def test_edge_and_fleet_agree() -> None:
    assert differences(FLEET, found_servers([SERVER])) == frozenset()


def test_a_server_of_nobody_is_closed_and_a_lost_one_opened_when_it_lasts() -> None:
    stray = replace(SERVER, slot=9, server=0)
    servers = found_servers([stray])
    first = differences(FLEET, servers)
    assert repairs(frozenset(), FLEET, servers) == ()
    assert repairs(first, FLEET, servers) == (
        CloseRoute("unknown-slot9-e0", 9, 0),
        OpenRoute("e1", 3, 2, "127.0.0.1:9", 128),
    )
    assert repairs(first, FLEET, found_servers([SERVER])) == ()


def test_nothing_is_repaired_before_the_fleet_has_settled() -> None:
    assert differences(replace(FLEET, settled=False), found_servers([SERVER])) == frozenset()


def test_an_engine_that_drains_is_left_alone() -> None:
    fleet = replace(FLEET, engines={"e1": replace(ENGINE, state=EngineState.DRAINING, route=RouteState.DRAINING)})
    assert differences(fleet, ()) == frozenset()


def test_the_place_of_a_refused_route_is_kept_for_the_next_try() -> None:
    fleet = replace(FLEET, engines={"e1": replace(ENGINE, route=RouteState.NONE)})
    assert differences(fleet, found_servers([SERVER])) == frozenset()
