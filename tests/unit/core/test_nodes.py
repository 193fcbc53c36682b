"""Stories of nodes: growth, giving back, agents that die, controllers that are killed."""

from __future__ import annotations

from typing import Any

from serve.core import events as ev
from serve.core.effects import CloseRoute, CreateAgent, DrainRoute, KillAgent, OpenRoute, StartEngine, StopEngine
from serve.core.state import EngineState, Fleet, NodePhase, RouteState
from serve.core.step import DEFAULT, initial
from serve.core.transaction import Transaction
from tests.support.fleets import GIB, Story, a_kind, a_model, a_policy, begin

CPU, GPU = a_kind("cpu", 6, most=2), a_kind("gpu", 1, gpus=(40, 40), most=1)


def grown() -> Story:
    """Model a serves on a node that was asked for."""
    story = begin(a_model("a"), a_model("b"), a_model("g", 30, gpus=2), policy=a_policy(CPU, GPU), nodes=())
    story.ask("a")
    story.join("cpu-1-1")
    story.loaded("a")
    return story


def test_the_first_request_asks_for_the_first_node_and_others_wait_for_the_same() -> None:
    story = begin(a_model("a"), a_model("c", 1), policy=a_policy(CPU), nodes=())
    story.ask("a")
    assert story.effects == (CreateAgent("cpu-1-1", "cpu"),)
    story.ask("a")
    story.ask("c")
    story.tick(5)
    assert len(story.ever(CreateAgent)) == 1, "what is pending is credited"
    story.join("cpu-1-1")
    assert [start.model.name for start in story.said(StartEngine)] == ["a", "c"]


def test_a_gpu_model_asks_for_a_gpu_node() -> None:
    story = grown()
    story.ask("g")
    assert story.said(CreateAgent) == (CreateAgent("gpu-1-3", "gpu"),)


def test_eviction_comes_before_growth_and_growth_only_when_pressure_lasts() -> None:
    story = grown()
    story.seen("a", in_flight=1)
    story.ask("b", after=5)
    assert not story.effects, "it may be idle in a moment"
    story.tick(2)
    assert story.said(CreateAgent)
    story.seen("a", in_flight=0)
    assert story.said(DrainRoute)
    story.tick(1)
    story.tick(100)
    assert not story.ever(KillAgent), "its place in the queue is kept for a while"
    story.tick(20)
    assert story.said(KillAgent), "nobody needs the pending node any more"


def test_never_more_than_max_nodes() -> None:
    models = [a_model(f"m{i}", 5) for i in range(4)]
    story = begin(*models, policy=a_policy(CPU), nodes=())
    for model in models:
        story.ask(model.name)
    story.tick(60)
    assert len(story.ever(CreateAgent)) == 2


def test_min_nodes_are_kept() -> None:
    story = begin(a_model("a"), policy=a_policy(a_kind("cpu", 6, least=1, most=2)), nodes=())
    assert story.ever(CreateAgent) == (CreateAgent("cpu-1-1", "cpu"),)
    story.join("cpu-1-1")
    story.tick(10_000)
    assert not story.effects


def test_a_node_that_cannot_be_had_is_asked_for_again_after_a_back_off() -> None:
    story = begin(a_model("a"), policy=a_policy(CPU), nodes=())
    story.ask("a")
    story.on(ev.NodeFailed("cpu-1-1", "no such partition"))
    assert not story.effects
    story.tick(2)
    assert story.effects == (CreateAgent("cpu-1-2", "cpu"),)


def test_an_empty_node_is_given_back_after_a_while() -> None:
    story = grown()
    story.on(ev.UnloadAsked("a"))
    story.drained("a")
    story.exited("a", expected=True)
    story.tick(3599)
    assert not story.effects, "the last one is kept longer"
    story.tick(2)
    assert story.effects == (KillAgent("cpu-1-1"),)
    assert not story.fleet.nodes


def test_a_node_asked_to_leave_drains_its_engines_first() -> None:
    story = grown()
    story.seen("a", in_flight=1)
    story.on(ev.NodeDrainAsked("cpu-1-1"))
    assert [type(effect) for effect in story.effects] == [DrainRoute]
    ticket = story.ask("b")
    assert not story.said(StartEngine), "takes no new engine"
    story.drained("a")
    story.exited("a", expected=True)
    assert story.ever(KillAgent) == (KillAgent("cpu-1-1"),)
    assert ticket in story.fleet.waiters
    story.tick(3)
    assert story.ever(CreateAgent)[-1].node != "cpu-1-1"


def test_a_lost_node_costs_its_engines_and_waiters_wait_on() -> None:
    story = grown()
    ticket = story.ask("b", after=5)
    story.on(ev.NodeGone("cpu-1-1", "preempted"))
    assert story.said(CloseRoute) == (CloseRoute("a-1-2", 0, 0),) or story.fleet.closing
    assert not story.fleet.engines
    assert story.said(CreateAgent)
    assert ticket in story.fleet.waiters
    assert not story.fleet.failures


def test_when_only_the_agent_dies_its_engines_serve_on_and_are_adopted() -> None:
    story = grown()
    story.on(ev.NodeGone("cpu-1-1", "killed", node_alive=True))
    assert story.effects == (CreateAgent("cpu-1-1", "cpu", block="block-cpu-1-1"),)
    assert story.ask("a") in story.answers(), "warm requests go on"
    story.ask("b", after=5)
    story.tick(10)
    assert not story.said(DrainRoute), "no agent to stop it: not a victim"
    found = ev.FoundEngine("a-1-2", "a", (), 4 * GIB, 1000.0, "10.0.0.1:2", True, 10.0)
    story.join("cpu-1-1", engines=(found,))
    assert not story.said(OpenRoute) + story.said(CloseRoute)
    assert [drain.engine for drain in story.said(DrainRoute)] == ["a-1-2"], "and now it can make way"


def test_an_engine_that_died_with_its_agent_is_gone() -> None:
    story = grown()
    story.on(ev.NodeGone("cpu-1-1", "killed", node_alive=True))
    story.join("cpu-1-1")
    assert story.effects == (CloseRoute("a-1-2", 0, 0),)
    assert story.fleet.nodes["cpu-1-1"].free_host_mib == 6 * GIB


def test_an_agent_that_cannot_be_made_again_loses_its_engines() -> None:
    story = grown()
    story.on(ev.NodeGone("cpu-1-1", "killed", node_alive=True))
    story.on(ev.NodeFailed("cpu-1-1", "node is gone too"))
    assert not story.fleet.engines
    assert not story.fleet.nodes


def restarted(*servers: ev.FoundServer, **fields: Any) -> Story:
    """A second controller's life, one node found, model a in slot 3."""
    story = Story(initial(a_policy()))
    story.on(ev.CatalogChanged((a_model("a", **fields), a_model("b"))))
    story.on(ev.Started(2, {"a": 3}, servers, ("cpu-1-1",)))
    return story


WARM = ev.FoundServer(3, 1, "10.0.0.1:7", up=True, draining=False, in_flight=2, idle_s=0.0)
ENGINE = ev.FoundEngine("a-1-2", "a", (), 4 * GIB, 900.0, "10.0.0.1:7", True, 12.0)


def test_after_a_restart_a_warm_engine_is_found_and_nothing_is_done_to_it() -> None:
    story = restarted(WARM)
    story.ask("a")
    story.ask("b")
    story.tick(0.5)
    assert not story.ever(StartEngine), "not before everybody reported"
    story.join("cpu-1-1", engines=(ENGINE,))
    assert story.answers()["t1"].error is None
    assert not {type(effect) for effect in story.effects} & {StartEngine, StopEngine, OpenRoute, DrainRoute, CloseRoute}
    engine = story.engine("a")
    assert (engine.state, engine.route, engine.slot, engine.server) == (EngineState.READY, RouteState.OPEN, 3, 1)
    story.seen("a", in_flight=0, after=5)
    assert story.said(DrainRoute) == (DrainRoute("a-1-2", 3, 1),), "b's turn"


def test_a_drain_found_at_a_restart_goes_on_or_is_taken_back() -> None:
    draining = ev.FoundServer(3, 1, "10.0.0.1:7", up=True, draining=True, in_flight=0, idle_s=5.0)
    story = restarted(draining)
    story.join("cpu-1-1", engines=(ENGINE,))
    story.seen("a", in_flight=0)
    assert story.said(StopEngine)
    story = restarted(draining)
    story.ask("a")
    story.join("cpu-1-1", engines=(ENGINE,))
    assert story.said(OpenRoute) == (OpenRoute("a-1-2", 3, 1, "10.0.0.1:7", 128),)


def test_an_engine_without_a_server_gets_its_route_and_one_still_loading_loads_on() -> None:
    story = restarted()
    story.join("cpu-1-1", engines=(ENGINE,))
    assert story.said(OpenRoute) == (OpenRoute("a-1-2", 3, 0, "10.0.0.1:7", 128),)
    story = restarted()
    loading = ev.FoundEngine("a-1-2", "a", (), 4 * GIB, 990.0, "", False)
    story.ask("a")
    story.join("cpu-1-1", engines=(loading,))
    assert not story.ever(StartEngine)
    story.got_ready("a")
    assert story.said(OpenRoute)


def test_servers_nobody_answers_for_are_closed_after_thirty_seconds_at_most() -> None:
    story = restarted(WARM)
    story.tick(29)
    assert not story.effects
    story.tick(1)
    assert story.said(CloseRoute) == (CloseRoute("unknown-slot3-e1", 3, 1),)
    story.on(ev.RouteClosed("unknown-slot3-e1"))
    assert not story.fleet.closing


def test_an_engine_of_an_unknown_model_is_let_go_behind_its_drained_route() -> None:
    server = ev.FoundServer(5, 0, "10.0.0.1:9", up=True, draining=False, in_flight=1, idle_s=0.0)
    story = restarted(server)
    stranger = ev.FoundEngine("old-1-1", "old", (), 2 * GIB, 900.0, "10.0.0.1:9", True)
    story.join("cpu-1-1", engines=(stranger,))
    assert story.said(DrainRoute) == (DrainRoute("old-1-1", 5, 0),)
    story.drained("old")
    assert [stop.reason for stop in story.said(StopEngine)] == ["catalog"]


def test_engines_that_hold_more_than_there_is_are_stopped() -> None:
    story = restarted()
    other = ev.FoundEngine("b-1-3", "b", (), 4 * GIB, 950.0, "", False)
    story.join("cpu-1-1", engines=(ENGINE, other))
    assert [stop.engine for stop in story.said(StopEngine)] == ["b-1-3"]


def test_room_on_an_over_committed_node_that_is_being_freed_is_waited_for() -> None:
    story = Story(initial(a_policy(CPU)))
    story.on(ev.CatalogChanged((a_model("a"), a_model("b"), a_model("c", 2))))
    story.on(ev.Started(2, {"a": 3}, (WARM,), ("cpu-1-1",)))
    other = ev.FoundEngine("b-1-3", "b", (), 4 * GIB, 950.0, "", False)
    story.join("cpu-1-1", engines=(ENGINE, other))
    assert story.fleet.nodes["cpu-1-1"].free_host_mib == -2 * GIB
    story.ask("c")
    story.tick(10)
    assert not story.said(CreateAgent), "2 GiB are free once b-1-3 has ended"
    assert not story.said(DrainRoute)
    story.on(ev.EngineExited("b-1-3", "stopped", expected=True))
    assert [start.model.name for start in story.said(StartEngine)] == ["c"]


def test_an_agent_that_was_given_back_and_comes_all_the_same_is_sent_away() -> None:
    story = begin(a_model("a"), nodes=())
    story.join("cpu-9-9")
    assert story.said(KillAgent) == (KillAgent("cpu-9-9", block_goes=False),)
    assert "cpu-9-9" not in story.fleet.nodes


def test_ids_of_a_new_life_are_new() -> None:
    story = restarted()
    story.ask("b")
    story.join("cpu-1-1")
    assert story.said(StartEngine)[0].engine == "b-2-1"
    assert story.said(StartEngine)[0].epoch == 2
    assert story.fleet.nodes["cpu-1-1"].phase is NodePhase.UP


def test_ids_are_short_and_in_the_order_of_time() -> None:
    """Epochs are seconds since 1970. Ties are broken by id."""
    epochs = (1, 35, 36, 1_795_684_667, 1_795_684_668, 2_000_000_000)
    names = [Transaction(Fleet(a_policy(CPU), epoch=epoch), 0.0, DEFAULT).name("local", 7) for epoch in epochs]
    assert names[:3] == ["local-1-7", "local-z-7", "local-10-7"]
    assert [int(name.split("-")[1], 36) for name in names] == list(epochs)
    assert names[3:] == sorted(names[3:])
    assert max(map(len, names)) == len("local-tp3xkb-7")
