"""Stories of switching: one room, several models."""

from __future__ import annotations

from typing import Any

import pytest

from serve.core import events as ev
from serve.core.effects import Answer, CloseRoute, DrainRoute, OpenRoute, StartEngine, StopEngine, SyncSlots
from serve.core.forecast import eta_s, model_state
from serve.core.state import EngineState, RouteState
from tests.support.fleets import Story, a_model, a_policy, begin


def one_room() -> Story:
    """Room for one of three models."""
    return begin(a_model("a"), a_model("b"), a_model("c"))


def serving_a(**fields: Any) -> Story:
    """Model a is loaded and was used once."""
    story = begin(a_model("a", **fields), a_model("b"), a_model("c"))
    story.ask("a")
    story.loaded("a")
    story.used("a")
    return story


def test_a_burst_for_a_cold_model_is_one_load_and_everybody_goes_when_the_edge_says_up() -> None:
    story = one_room()
    first = story.ask("a")
    slots, start = story.did()
    assert slots == SyncSlots({"a": 0}, fresh=(0,))
    assert isinstance(start, StartEngine)
    assert (start.node, start.slot, start.epoch) == ("cpu-0-0", 0, 1)
    others = [story.ask("a") for _ in range(9)]
    assert len(story.ever(StartEngine)) == 1
    story.got_ready("a")
    assert story.did() == (OpenRoute(start.engine, 0, 0, "10.0.0.1:1", 128),)
    assert not story.answers(), "ready is not enough: the edge must say that the server is up"
    story.opened("a")
    assert story.did() == tuple(Answer(ticket) for ticket in (first, *others))
    late = story.ask("a")
    assert story.did() == (Answer(late),)


def test_a_switch_drains_then_stops_then_starts() -> None:
    story = serving_a()
    story.ask("b", after=5)
    assert story.did() == (DrainRoute("a-1-1", 0, 0),)
    assert story.fleet.switches == 1
    story.on(ev.RouteDrained("a-1-1"))
    assert not story.did()
    story.seen("a", in_flight=1)
    assert not story.did(), "a stream goes on"
    story.seen("a", in_flight=0)
    assert story.did() == (StopEngine("a-1-1", "cpu-0-0", 1, "evicted"), CloseRoute("a-1-1", 0, 0))
    story.tick(1)
    assert not story.said(StartEngine), "its memory is held until its process is gone"
    story.on(ev.EngineExited("a-1-1", "stopped", True))
    assert [start.model.name for start in story.said(StartEngine)] == ["b"]
    assert model_state(story.fleet, "a") == "cold"
    story.loaded("b")
    assert story.answers()["t2"].error is None


def test_a_count_read_before_the_drain_was_acknowledged_ends_nothing() -> None:
    story = serving_a()
    story.ask("b", after=5)
    story.seen("a", in_flight=0, after=0.05)
    assert not story.said(StopEngine), "not acknowledged yet"
    story.on(ev.RouteDrained("a-1-1"), 0.05)
    story.seen("a", in_flight=0, after=0.05, read_age_s=0.08)
    assert not story.said(StopEngine), "asked for before the acknowledgement"
    story.seen("a", in_flight=0, after=0.05, read_age_s=0.01)
    assert story.said(StopEngine)


def test_a_busy_engine_keeps_its_place_for_its_quantum_and_an_idle_one_gives_it_up() -> None:
    story = serving_a()
    story.seen("a", in_flight=1)
    for _ in range(8):
        story.ask("b")
    story.tick(5)
    assert not story.did(), "it has served for less than its load took"
    story.seen("a", in_flight=0, after=1)
    assert story.said(DrainRoute)


def test_a_busy_engine_is_drained_when_those_who_wait_weigh_more() -> None:
    story = serving_a()
    story.seen("a", in_flight=1)
    story.ask("b", after=5)
    assert not story.did(), "both loads, which a's next request would wait for, weigh more than one new waiter"
    for _ in range(40):
        if story.tick(1):
            break
    assert story.said(DrainRoute), "it has waited"
    story.on(ev.RouteDrained("a-1-1"))
    again = story.ask("a")
    assert not story.did(), "its next requests wait"
    story.seen("a", in_flight=0)
    assert story.said(StopEngine)
    assert again not in story.answers()


def test_an_engine_just_promised_to_waiters_is_not_idle_before_they_reach_it() -> None:
    story = one_room()
    story.ask("a")
    story.ask("b")
    story.loaded("a")
    story.tick(1.0)
    assert not story.said(DrainRoute), "the request is on its way"
    story.used("a")
    assert story.said(DrainRoute), "it came and went"


def test_without_any_use_the_grace_ends() -> None:
    story = one_room()
    story.ask("a")
    story.ask("b")
    story.loaded("a")
    story.tick(2.0)
    assert story.said(DrainRoute)


def test_min_residency_keeps_an_idle_engine_for_a_while() -> None:
    story = serving_a(min_residency=60)
    story.ask("b", after=5)
    assert not story.did()
    story.tick(60)
    assert story.said(DrainRoute)


def test_a_pinned_engine_is_never_a_victim() -> None:
    story = serving_a(pinned=True)
    story.ask("b", wait_s=100, after=5)
    story.tick(99)
    assert not story.did()
    story.tick(1)
    assert story.answers()["t2"].error is not None
    story.on(ev.PinChanged("a", False))
    story.ask("b")
    assert story.said(DrainRoute)


def test_the_least_recently_used_goes_and_no_more_than_needed() -> None:
    story = begin(a_model("a", 2), a_model("b", 2), a_model("c", 2), a_model("d", 2))
    for model in ("a", "b", "c"):
        story.ask(model)
        story.loaded(model)
        story.used(model)
    story.used("a")
    story.ask("d", after=5)
    assert [drain.engine for drain in story.said(DrainRoute)] == [story.engine("b").id]


def test_a_small_engine_is_spared_when_a_larger_one_must_go_anyway() -> None:
    story = begin(a_model("small", 1), a_model("large", 4), a_model("new", 5))
    for model in ("small", "large"):
        story.ask(model)
        story.loaded(model)
        story.used(model)
    story.ask("new", after=5)
    assert [drain.engine for drain in story.said(DrainRoute)] == [story.engine("large").id]


def test_nobody_evicts_twice_for_one_waiter_and_a_later_one_does_not_take_the_room() -> None:
    story = begin(a_model("a", 3), a_model("b", 2), a_model("big", 4), a_model("late", 1))
    for model in ("a", "b"):
        story.ask(model)
        story.loaded(model)
        story.used(model)
    story.ask("big", after=5)
    assert [drain.engine for drain in story.said(DrainRoute)] == [story.engine("a").id]
    story.tick(1)
    story.tick(1)
    assert not story.did()
    story.ask("late", after=1)  # 1 GiB is free, but big needs it with a's 3
    assert not story.said(StartEngine)
    story.drained("a")
    story.exited("a", expected=True)
    assert [start.model.name for start in story.ever(StartEngine)][-1] == "big"


def test_a_drain_is_taken_back_when_nobody_older_needs_the_room() -> None:
    story = serving_a()
    waiting = story.ask("b", after=5)
    assert story.said(DrainRoute)
    again = story.ask("a", after=0.1)
    assert not story.did(), "b waits longer"
    story.on(ev.WaiterLeft(waiting))
    assert not story.did(), "one route command at a time: the drain is not acknowledged yet"
    story.on(ev.RouteDrained("a-1-1"), 0.1)
    assert story.did() == (OpenRoute("a-1-1", 0, 0, "10.0.0.1:1", 128),)
    story.opened("a")
    assert story.did() == (Answer(again),)
    story.seen("a", in_flight=0)
    story.tick(60)
    assert not story.said(StopEngine)


def test_the_drain_deadline_is_the_only_way_a_stream_is_cut() -> None:
    story = serving_a(drain_timeout=30)
    story.ask("b", after=5)
    story.on(ev.RouteDrained("a-1-1"))
    story.seen("a", in_flight=1)
    story.tick(29)
    assert not story.did()
    story.tick(1)
    assert [stop.engine for stop in story.said(StopEngine)] == ["a-1-1"]


def test_keep_alive_unloads_an_idle_model_that_nobody_needs_the_room_of() -> None:
    story = serving_a(keep_alive=60)
    story.seen("a", in_flight=1)
    story.tick(100)
    assert not story.did(), "busy"
    story.seen("a", in_flight=0)
    story.tick(59.8)
    assert not story.did()
    story.tick(1)
    assert story.said(DrainRoute)


def test_keep_alive_zero_unloads_after_the_first_use() -> None:
    story = begin(a_model("a", keep_alive=0))
    story.ask("a")
    story.loaded("a")
    story.tick(0.5)
    assert not story.did()
    story.used("a")
    assert story.said(DrainRoute)


def test_states_and_expectations_on_the_way() -> None:
    story = one_room()
    assert (model_state(story.fleet, "a"), eta_s(story.fleet, "a", story.now)) == ("cold", 60.0)
    story.ask("a")
    story.tick(20)
    assert (model_state(story.fleet, "a"), eta_s(story.fleet, "a", story.now)) == ("loading", 40.0)
    story.loaded("a")
    assert (model_state(story.fleet, "a"), eta_s(story.fleet, "a", story.now)) == ("ready", 0.0)
    story.used("a")
    story.ask("b", after=5)
    assert (model_state(story.fleet, "a"), model_state(story.fleet, "b")) == ("draining", "queued")
    assert eta_s(story.fleet, "a", story.now) == 10.0, "as long as the last time"


def test_a_slot_goes_to_another_model_only_when_its_tenant_and_its_server_are_gone() -> None:
    story = begin(a_model("a", aliases=("a1",)), a_model("b"), policy=a_policy(slots=1))
    story.ask("a1")
    assert story.said(SyncSlots) == (SyncSlots({"a": 0, "a1": 0}, fresh=(0,)),)
    story.loaded("a")
    story.used("a")
    story.ask("b", after=5)
    story.drained("a")
    story.on(ev.EngineExited("a-1-1", "stopped", True))
    assert not story.did(), "its server is not closed yet"
    story.on(ev.RouteClosed("a-1-1"))
    assert story.said(SyncSlots) == (SyncSlots({"b": 0}, fresh=(0,)),)
    assert [type(effect) for effect in story.effects] == [SyncSlots, StartEngine]


def test_with_free_room_but_no_free_slot_an_idle_model_makes_way() -> None:
    story = begin(a_model("a", 1), a_model("b", 1), policy=a_policy(slots=1))
    story.ask("a")
    story.loaded("a")
    story.used("a")
    story.ask("b", after=5)
    assert [drain.engine for drain in story.said(DrainRoute)] == ["a-1-1"]


@pytest.mark.parametrize("gpus", [(40, 40), (40, 40, 40)])
def test_models_share_gpus_by_memory_and_take_distinct_ones(gpus: tuple[int, ...]) -> None:
    models = a_model("one", 30, gpus=1), a_model("two", 10, gpus=2), a_model("three", 35, gpus=2)
    story = begin(*models, policy=a_policy(), gpus=gpus)
    story.ask("one")
    assert story.said(StartEngine)[0].gpus == (0,)
    story.loaded("one")
    story.ask("two")
    assert story.said(StartEngine)[0].gpus == (0, 1), "the tightest fit, on two devices"
    story.ask("three")
    assert not story.said(StartEngine)


def test_a_route_that_is_refused_is_tried_again_and_then_the_engine_is_given_up() -> None:
    story = one_room()
    ticket = story.ask("a")
    story.got_ready("a")
    for _ in range(story.fleet.policy.route_refusals_max):
        story.on(ev.RouteRefused("a-1-1", "no"))
        assert not story.said(OpenRoute), "not at once"
        story.tick(30)
    assert story.engine("a").state is EngineState.DRAINING
    assert story.engine("a").route is RouteState.DRAINING, "a request may have reached it: drained first"
    story.drained("a")
    assert story.said(StopEngine)
    assert ticket not in story.answers(), "and tried again with another engine"


def test_a_request_that_found_no_server_waits_until_the_edge_says_up_again() -> None:
    story = serving_a()
    ticket = story.ask("a", not_routed=True)
    assert not story.did()
    story.seen("a", read_age_s=0.2)
    assert not story.did(), "an old count"
    story.seen("a")
    assert story.did() == (Answer(ticket),)


def test_a_model_whose_engine_makes_room_in_peace_is_not_one_that_crashes() -> None:
    story = serving_a()
    story.exited("a", "killed by somebody")
    assert story.fleet.failures["a"].count == 1, "young and dead"
    story.ask("a", after=30)
    story.loaded("a")
    story.used("a")
    story.ask("b", after=3)  # before a's engine is old enough to be forgiven for its age
    story.drained("a")
    assert "a" in story.fleet.failures
    story.exited("a", "stopped", expected=True)
    assert "a" not in story.fleet.failures
