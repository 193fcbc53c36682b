"""Stories of the warm tier: one GPU, models that take turns on it, asleep in host memory meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gateway_plugin.catalog import Model
from serve.core import events as ev
from serve.core.effects import CloseRoute, DrainRoute, OpenRoute, SleepEngine, StartEngine, StopEngine, WakeEngine
from serve.core.forecast import eta_s, model_state
from serve.core.state import Action, EngineState
from serve.core.step import initial
from tests.support.fleets import GIB, Story, a_kind, a_model, a_policy, begin

NODE = "gpu-0-0"
POLICY = a_policy(a_kind("gpu", 4, gpus=(10,), most=1), sleep_once_loaded=False)


def one_gpu(*models: Model, sleep_gib: int = 40, policy: Any = POLICY) -> Story:
    """One GPU of 10 GiB; each model needs 8 unless it says otherwise."""
    models = models or tuple(a_model(name, 8, gpus=1) for name in "abc")
    return begin(*models, policy=policy, nodes=(NODE,), host_gib=4, gpus=(10,), sleep_mib=sleep_gib * GIB)


def serving(story: Story, model: str, **fields: Any) -> Story:
    story.ask(model)
    story.loaded(model, **{"can_sleep": True, **fields})
    story.used(model)
    return story


def asleep(story: Story, model: str, sleep_gib: float = 4, kept_mib: int = 0) -> None:
    """The drain of ``model`` ends, and it falls asleep."""
    story.drained(model)
    assert story.said(SleepEngine) == (SleepEngine(story.engine(model).id, NODE, 1),)
    story.on(ev.EngineAsleep(story.engine(model).id, int(sleep_gib * GIB), 1.0, kept_mib), 1.0)


def switched(story: Story, old: str, new: str, **fields: Any) -> None:
    """``new`` is asked for: ``old`` falls asleep, ``new`` is loaded and used."""
    story.ask(new, after=5)
    asleep(story, old, **fields)
    story.loaded(new, can_sleep=True)
    story.used(new)


def test_an_evicted_engine_sleeps_and_wakes_when_its_model_is_asked_for_again() -> None:
    story = serving(one_gpu(), "a")
    first = story.engine("a").id
    story.ask("b", after=5)
    story.drained("a")
    assert story.did() == (CloseRoute(first, 0, 0), SleepEngine(first, NODE, 1)), "its route is closed before"
    assert story.engine("a").state is EngineState.FALLING_ASLEEP
    story.tick(1)
    assert not story.ever(StopEngine)
    assert len(story.ever(StartEngine)) == 1, "its GPU is held until its agent reports"
    story.on(ev.RouteClosed(first))
    story.on(ev.EngineAsleep(first, 4 * GIB, 1.0), 1.0)
    assert [start.model.name for start in story.said(StartEngine)] == ["b"]
    assert (model_state(story.fleet, "a"), eta_s(story.fleet, "a", story.now)) == ("asleep", 5.0)
    story.loaded("b", can_sleep=True)
    story.used("b")

    story.ask("a", after=5)
    story.drained("b")
    assert not story.said(WakeEngine), "the GPU is in use"
    story.on(ev.EngineAsleep(story.engine("b").id, 4 * GIB, 0.5), 0.5)
    assert story.did() == (WakeEngine(first, NODE, 1),)
    assert model_state(story.fleet, "a") == "loading"
    story.tick(1)
    assert not story.did(), "no route before it is known to answer as before"
    story.on(ev.EngineAwake(first, 0.8), 0.2)
    assert story.did() == (OpenRoute(first, 0, 0, "10.0.0.1:1", limit=256),)
    story.opened("a")
    assert story.answers()["t3"].error is None
    assert len(story.ever(StartEngine)) == 2
    assert story.fleet.wake_s == {"a": 0.8}
    assert [(one.action, one.model) for one in story.fleet.decisions if one.action in (Action.SLEEP, Action.WAKE)] == [
        (Action.SLEEP, "a"), (Action.SLEEP, "b"), (Action.WAKE, "a")
    ]  # fmt: skip


def test_one_asked_for_while_it_falls_asleep_is_waited_for() -> None:
    story = serving(one_gpu(), "a")
    story.ask("b", after=5)
    story.drained("a")
    story.ask("a", after=0.1)
    story.on(ev.WaiterLeft("t2"))
    assert not story.ever(WakeEngine)
    story.on(ev.EngineAsleep(story.engine("a").id, 4 * GIB, 1.0), 1.0)
    assert story.did() == (WakeEngine(story.engine("a").id, NODE, 1),)
    assert len(story.ever(StartEngine)) == 1


def test_an_idle_one_past_its_keep_alive_sleeps() -> None:
    story = serving(one_gpu(a_model("a", 8, gpus=1, keep_alive=30)), "a")
    story.tick(31)
    assert story.said(DrainRoute)
    asleep(story, "a")
    assert story.engine("a").state is EngineState.ASLEEP


@pytest.mark.parametrize(
    "why", ["the agent cannot", "the catalog", "in flight", "the node leaves", "unloaded", "memory"]
)
def test_it_is_stopped_instead(why: str) -> None:
    model = a_model("a", 8, gpus=1, drain_timeout=30, sleep=False if why == "the catalog" else None)
    story = one_gpu(model, a_model("b", 8, gpus=1), sleep_gib=7 if why == "memory" else 40)
    serving(story, "a", can_sleep=why != "the agent cannot")
    story.ask("b", after=5)
    story.on(ev.RouteDrained(story.engine("a").id))
    if why == "the node leaves":
        story.on(ev.NodeDrainAsked(NODE))
    if why == "unloaded":
        story.on(ev.UnloadAsked("a"))
    if why == "in flight":
        story.seen("a", in_flight=1)
        story.tick(31)
    else:
        story.seen("a", in_flight=0)
    assert [stop.engine for stop in story.ever(StopEngine)] == [story.engine("a").id]
    assert not story.ever(SleepEngine)


def test_one_that_no_agent_could_put_to_sleep_in_time_is_stopped_and_so_is_one_that_does_not_wake() -> None:
    story = serving(one_gpu(*(a_model(name, 8, gpus=1, load_timeout=60) for name in "ab")), "a")
    story.ask("b", after=5)
    story.drained("a")
    story.tick(61)
    assert [stop.reason for stop in story.said(StopEngine)] == ["sleep-timeout"]
    story.exited("a", expected=True)
    assert story.fleet.sleep_doubts == {"a": 1}
    story.loaded("b", can_sleep=True)
    story.used("b")
    story.ask("a", after=5)
    asleep(story, "b")
    story.loaded("a", can_sleep=True)
    story.used("a")
    story.ask("b", after=5)
    asleep(story, "a")
    assert story.said(WakeEngine)
    story.tick(61)
    assert [stop.reason for stop in story.said(StopEngine)] == ["wake-timeout"]
    story.exited("b", expected=True)
    assert [start.model.name for start in story.ever(StartEngine)] == ["a", "b", "a", "b"], "loaded afresh"


def test_after_two_doubts_in_a_row_a_model_sleeps_no_more_and_a_good_wake_clears_one() -> None:
    story = serving(one_gpu(), "a")
    for doubts in (1, 2):
        story.ask("b", after=5)
        story.drained("a")
        assert story.said(SleepEngine)
        story.on(ev.EngineExited(story.engine("a").id, "in doubt", False, doubt=True), 1.0)
        assert story.fleet.sleep_doubts == {"a": doubts}
        assert "a" not in story.fleet.failures
        story.on(ev.WaiterLeft(f"t{story.tickets}"))
        story.on(ev.EngineExited(story.engine("b").id, "abandoned", True))
        serving(story, "a")
    story.ask("b", after=5)
    story.drained("a")
    assert story.said(StopEngine)
    story.exited("a", expected=True)
    story.loaded("b", can_sleep=True)
    story.used("b")
    switched(story, "b", "a")
    story.ask("b", after=5)
    story.drained("a")
    story.exited("a", expected=True)
    story.on(ev.EngineAwake(story.engine("b").id, 1.0), 1.0)
    assert story.fleet.sleep_doubts == {"a": 2}, "of another model"


def test_the_least_valuable_sleeper_is_stopped_for_another_or_this_one_is() -> None:
    story = serving(one_gpu(sleep_gib=12), "a")
    switched(story, "a", "b", sleep_gib=6)
    story.ask("c", after=5)
    story.drained("b")  # it needs 8 until it has slept, and 6 are left
    stopped = story.engine("a").id
    assert [stop.engine for stop in story.said(StopEngine)] == [stopped]
    assert story.engine("b").state is EngineState.DRAINING
    story.on(ev.EngineExited(stopped, "stopped", True), 0.5)
    assert [sleep.engine for sleep in story.said(SleepEngine)] == [story.engine("b").id]
    assert story.fleet.nodes[NODE].free_sleep_mib == 4 * GIB
    story.on(ev.EngineAsleep(story.engine("b").id, 5 * GIB, 1.0), 1.0)
    assert story.fleet.nodes[NODE].free_sleep_mib == 7 * GIB
    story.loaded("c", can_sleep=True)
    story.on(ev.PinChanged("b", True), 5)
    story.drained("c")
    assert [stop.engine for stop in story.said(StopEngine)] == [story.engine("c").id], "the other one is wanted"


@pytest.mark.parametrize("how", ["unloaded", "catalog", "drain"])
def test_a_sleeper_is_stopped_at_once_and_holds_no_more_than_before(how: str) -> None:
    story = serving(one_gpu(), "a")
    switched(story, "a", "b", kept_mib=GIB)
    sleeper = story.engine("a").id
    assert story.fleet.nodes[NODE].free_gpu_mib == (GIB,)
    told: dict[str, ev.Event] = {
        "unloaded": ev.UnloadAsked("a"),
        "catalog": ev.CatalogChanged((a_model("b", 8, gpus=1),)),
        "drain": ev.NodeDrainAsked(NODE),
    }
    story.on(told[how], 1.0)
    assert [stop.engine for stop in story.said(StopEngine)] == [sleeper]
    assert story.fleet.nodes[NODE].free_gpu_mib == (GIB,)
    story.on(ev.EngineExited(sleeper, "stopped", True), 0.5)
    assert story.fleet.nodes[NODE].free_gpu_mib == (2 * GIB,)
    assert story.fleet.nodes[NODE].free_sleep_mib == 40 * GIB


def test_one_whose_rest_on_the_gpu_is_in_the_way_is_stopped() -> None:
    story = serving(one_gpu(a_model("a", 8, gpus=1), a_model("b", 10, gpus=1)), "a")
    story.ask("b", after=5)
    asleep(story, "a", kept_mib=GIB)
    assert [stop.engine for stop in story.said(StopEngine)] == [story.engine("a").id]
    story.exited("a", expected=True)
    assert [start.model.name for start in story.ever(StartEngine)] == ["a", "b"]


def test_a_new_engine_may_sleep_once_before_it_serves_where_there_is_host_memory() -> None:
    policy = a_policy(a_kind("gpu", 4, gpus=(10,), most=1))
    story = one_gpu(sleep_gib=9, policy=policy)
    story.ask("a")
    (start,) = story.said(StartEngine)
    assert start.sleep_mib == 8 * GIB
    assert story.fleet.nodes[NODE].free_sleep_mib == GIB
    story.loaded("a", can_sleep=True, sleep_mib=5 * GIB)
    assert story.fleet.nodes[NODE].free_sleep_mib == 4 * GIB
    story.used("a")
    story.ask("b", after=5)
    asleep(story, "a", sleep_gib=5)
    (start,) = story.said(StartEngine)
    assert start.sleep_mib == 0, "4 GiB are left, and 8 may be needed"


def found(asleep: bool, under_way: Any = "", **fields: Any) -> ev.FoundEngine:
    ready = not asleep and not under_way
    known = {"asleep": asleep, "under_way": under_way, "can_sleep": True, "sleep_mib": 4 * GIB, "kept_mib": GIB}
    return ev.FoundEngine("a-1-1", "a", (0,), 8 * GIB, 900.0, "10.0.0.1:1", ready, 10.0, **{**known, **fields})


def test_a_controller_that_starts_finds_them_asleep_and_nothing_is_reloaded() -> None:
    story = Story(initial(POLICY))
    story.on(ev.CatalogChanged(tuple(a_model(name, 8, gpus=1) for name in "ab")))
    server = ev.FoundServer(0, 0, "10.0.0.1:1", True, True, 0, 5.0)
    story.on(ev.Started(2, {"a": 0}, (server,), (NODE,)))
    story.join(NODE, 4, (10,), engines=(found(asleep=True),), sleep_mib=40 * GIB)
    assert story.fleet.settled
    assert story.engine("a").state is EngineState.ASLEEP
    assert story.said(CloseRoute) == (CloseRoute("a-1-1", 0, 0),), "no route leads to it"
    assert not story.said(StopEngine)
    node = story.fleet.nodes[NODE]
    assert (node.free_gpu_mib, node.free_sleep_mib) == ((9 * GIB,), 36 * GIB)
    story.ask("a")
    assert story.said(WakeEngine) == (WakeEngine("a-1-1", NODE, 2),)


@pytest.mark.parametrize(
    ("under_way", "outcome", "state"),
    [
        ("sleep", ev.EngineAsleep("a-1-1", 4 * GIB, 1.0), EngineState.ASLEEP),
        ("wake", ev.EngineAwake("a-1-1", 1.0), EngineState.READY),
        ("wake", ev.EngineExited("a-1-1", "in doubt", False, doubt=True), None),
    ],
)
def test_a_controller_that_starts_in_the_middle_hears_the_end_of_it(
    under_way: str, outcome: ev.Event, state: EngineState | None
) -> None:
    story = Story(initial(POLICY))
    story.on(ev.CatalogChanged((a_model("a", 8, gpus=1),)))
    story.on(ev.Started(2, {"a": 0}, (), (NODE,)))
    story.join(NODE, 4, (10,), engines=(found(False, under_way),), sleep_mib=40 * GIB)
    assert not story.did()[1:], "neither started nor stopped"
    story.on(outcome, 1.0)
    assert (story.engine("a").state if story.fleet.engines else None) is state


@pytest.mark.parametrize(("sent", "back"), [("sleep", True), ("sleep", False), ("wake", True), ("wake", False)])
def test_what_an_agent_made_again_did_not_hear_is_sent_again(sent: str, back: bool) -> None:
    """``back``: the engine is found as it was before the command."""
    story = serving(one_gpu(), "a")
    story.ask("b", after=5)
    story.drained("a")
    if sent == "wake":
        story.on(ev.EngineAsleep("a-1-1", 4 * GIB, 1.0), 1.0)
        story.on(ev.WaiterLeft("t2"))
        story.exited("b", expected=True)
        story.ask("a")
        assert story.said(WakeEngine)
    story.on(ev.NodeGone(NODE, "died", node_alive=True))
    engine = found(asleep=(sent == "sleep") is not back)
    story.join(NODE, 4, (10,), engines=(engine,), sleep_mib=40 * GIB)
    state = story.engine("a").state
    if back:
        assert story.said(SleepEngine if sent == "sleep" else WakeEngine)
        assert state is (EngineState.FALLING_ASLEEP if sent == "sleep" else EngineState.WAKING)
    else:
        assert state is (EngineState.ASLEEP if sent == "sleep" else EngineState.READY)


def test_less_host_memory_than_before_stops_those_found_asleep() -> None:
    story = Story(initial(POLICY))
    story.on(ev.CatalogChanged((a_model("a", 8, gpus=1),)))
    story.on(ev.Started(2, {"a": 0}, (), (NODE,)))
    story.join(NODE, 4, (10,), engines=(found(asleep=True),), sleep_mib=3 * GIB)
    assert [stop.reason for stop in story.said(StopEngine)] == ["sleep-memory"]


def test_a_node_with_sleepers_only_is_unused_and_released() -> None:
    story = serving(one_gpu(a_model("a", 8, gpus=1, keep_alive=30)), "a")
    story.tick(31)
    asleep(story, "a")
    story.tick(3700)
    assert [stop.reason for stop in story.said(StopEngine)] == ["node-leaving"]


def test_none_is_woken_while_its_agent_is_away_or_something_moves_on_its_gpu() -> None:
    story = serving(one_gpu(a_model("a", 8, gpus=1, keep_alive=30), a_model("b", 2, gpus=1)), "a")
    story.tick(31)
    asleep(story, "a")
    story.on(ev.NodeGone(NODE, "died", node_alive=True))
    story.ask("a")
    assert not story.ever(WakeEngine)
    story.on(ev.WaiterLeft(f"t{story.tickets}"))
    story.join(NODE, 4, (10,), engines=(found(asleep=True, kept_mib=0),), sleep_mib=40 * GIB)
    story.ask("b")
    assert story.said(StartEngine)
    story.ask("a", after=1)
    assert not story.ever(WakeEngine), "the other one loads there"
    story.got_ready("b")
    assert [wake.engine for wake in story.said(WakeEngine)] == ["a-1-1"]


@pytest.mark.parametrize("sent", ["sleep", "wake"])
def test_one_that_answers_an_agent_made_again_only_later_is_not_forgotten(sent: str) -> None:
    story = serving(one_gpu(a_model("a", 8, gpus=1, keep_alive=30)), "a")
    story.tick(31)
    story.drained("a")
    story.on(ev.RouteClosed("a-1-1"))
    if sent == "wake":
        story.on(ev.EngineAsleep("a-1-1", 4 * GIB, 1.0), 1.0)
        story.ask("a")
    story.on(ev.NodeGone(NODE, "died", node_alive=True))
    unsure = replace(found(asleep=False), ready=False)
    story.join(NODE, 4, (10,), engines=(unsure,), sleep_mib=40 * GIB)
    assert not story.said(SleepEngine)
    story.on(ev.EngineReady("a-1-1", "10.0.0.1:1", 10.0), 1.0)
    if sent == "sleep":
        assert story.did() == (SleepEngine("a-1-1", NODE, 1),)
    else:
        assert story.said(OpenRoute)
