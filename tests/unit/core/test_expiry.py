"""Stories of blocks that end: by their walltime, by a notice, without one."""

from __future__ import annotations

from typing import Any

import pytest

from serve.core import events as ev
from serve.core.effects import CloseRoute, CreateAgent, DrainRoute, KillAgent, StartEngine, StopEngine
from serve.core.state import NodePhase
from serve.core.step import initial
from tests.support.fleets import Story, a_block, a_kind, a_model, a_policy, begin

NODE = "cpu-0-0"
POLICY = {"drain_before_end_s": 300.0, "leave_before_end_s": 30.0}


def serving(ends: float | None, busy: int = 1, **fields: Any) -> Story:
    """Model a serves on a node, alone and at most one; its block ends at ``ends`` and began at 900."""
    story = begin(a_model("a", drain_timeout=20), a_model("b"), policy=a_policy(a_kind(most=1), **POLICY, **fields))
    if ends is not None:
        story.blocks(a_block(NODE, ends=ends))
    story.ask("a")
    story.loaded("a")
    story.seen("a", in_flight=busy)
    return story


def until(story: Story, when: float) -> None:
    """Time passes, in the end second by second."""
    while story.now + 1 < when:
        story.tick(20 if story.now + 60 < when else 1)
    story.tick(when - story.now)


def test_a_node_leaves_before_its_walltime_and_what_is_in_flight_has_until_then() -> None:
    story = serving(ends=4500.0)
    until(story, 4169.9)
    assert not story.ever(DrainRoute)
    assert story.fleet.nodes[NODE].phase is NodePhase.UP
    story.tick(0.1)
    assert story.said(DrainRoute), "4500 less 30 less 300"
    assert story.fleet.nodes[NODE].phase is NodePhase.LEAVING
    story.on(ev.RouteDrained(story.engine("a").id))
    story.seen("a", in_flight=1)
    until(story, 4469.9)
    assert not story.ever(StopEngine), "not its own drain_timeout_s of 20 s"
    story.tick(0.1)
    assert [stop.reason for stop in story.said(StopEngine)] == ["node-ends"]
    story.exited("a", "stopped", expected=True)
    assert story.ever(KillAgent) == (KillAgent(NODE),)


def test_a_node_that_is_quiet_is_given_back_at_once() -> None:
    story = serving(ends=4500.0)
    until(story, 4170.0)
    story.drained("a")
    assert story.said(StopEngine)
    story.exited("a", "stopped", expected=True)
    assert story.ever(KillAgent) == (KillAgent(NODE),)
    assert story.now < 4180.0


def test_a_short_block_drains_for_a_quarter_of_its_walltime_at_most() -> None:
    story = serving(ends=1100.0, load_guess_s=5.0)
    until(story, 1019.9)
    assert not story.ever(DrainRoute)
    story.tick(0.1)
    assert story.said(DrainRoute), "1100 less 30 less 50"


def test_a_model_whose_node_leaves_is_loaded_elsewhere_only_for_those_who_wait_when_there_may_be_one_node() -> None:
    story = serving(ends=4500.0)
    until(story, 4170.0)
    ticket = story.ask("a")
    until(story, 4175.0)
    assert ticket in story.fleet.waiters, "no request fails"
    assert not story.ever(CreateAgent), "never more than max_nodes"
    story.drained("a")
    story.exited("a", "stopped", expected=True)
    until(story, story.now + 3)
    assert story.ever(CreateAgent) == (CreateAgent("cpu-1-2", "cpu"),)
    story.join("cpu-1-2")
    assert [start.node for start in story.said(StartEngine)] == ["cpu-1-2"]


def test_a_short_block_that_took_most_of_its_time_to_start_serves_all_the_same() -> None:
    story = begin(a_model("a"), policy=a_policy(a_kind(most=2), **POLICY), nodes=())
    story.ask("a")
    (asked,) = story.ever(CreateAgent)
    began = story.now
    story.blocks(a_block(asked.node, starts=began, ends=began + 120.0))
    story.tick(42)
    story.join(asked.node)
    assert [start.node for start in story.said(StartEngine)] == [asked.node]
    assert not story.ever(KillAgent)


def test_an_extended_walltime_is_believed() -> None:
    story = serving(ends=4500.0)
    until(story, 4115.0)
    assert story.fleet.nodes[NODE].ending
    story.blocks(a_block(NODE, ends=8100.0))
    assert not story.fleet.nodes[NODE].ending
    until(story, 4600.0)
    assert not story.ever(DrainRoute)


# --- notices ---
def test_a_notice_drains_at_once_and_until_then() -> None:
    story = serving(ends=None)
    told = story.now
    story.on(ev.NodeLeaves(NODE, told + 20, "cancelled"))
    assert story.said(DrainRoute)
    story.on(ev.RouteDrained(story.engine("a").id))
    until(story, told + 19)
    assert not story.ever(StopEngine)
    until(story, told + 20)
    assert story.said(StopEngine)


def test_the_last_word_on_a_notice_counts() -> None:
    story = serving(ends=4500.0)
    story.on(ev.NodeLeaves(NODE, story.now + 20, "cancelled"))
    story.on(ev.RouteDrained(story.engine("a").id))
    story.on(ev.NodeLeaves(NODE, story.now + 60, "cancelled"), after=1)
    story.tick(30)
    assert not story.ever(StopEngine)
    story.tick(30)
    assert story.said(StopEngine)


def test_a_notice_to_a_stranger_is_ignored() -> None:
    story = serving(ends=None)
    story.on(ev.NodeLeaves("cpu-9-9", story.now + 20, "cancelled"))
    assert not story.effects


def test_a_block_that_is_being_cancelled_is_a_notice() -> None:
    story = serving(ends=4500.0)
    story.blocks(a_block(NODE, ends=4500.0, phase="cancelling"), after=1)
    assert story.said(DrainRoute)
    story.on(ev.RouteDrained(story.engine("a").id))
    told = story.now
    story.blocks(a_block(NODE, ends=4500.0, phase="cancelling", reason="again"), after=15)
    story.tick(4)
    assert not story.ever(StopEngine)
    story.tick(1)
    assert story.said(StopEngine), "the second look gave no more time"
    assert story.now == told + 20


# --- blocks that have ended ---
@pytest.mark.parametrize("phase", ["failed", "lost", "cancelled", "expired", "completed"])
def test_a_node_whose_block_has_ended_leaves_at_once_with_a_moment_for_what_is_in_flight(phase: str) -> None:
    story = serving(ends=4500.0)
    story.blocks(a_block(NODE, ends=4500.0, phase=phase, ended_at=story.now - 3), after=1)
    assert story.said(DrainRoute)
    assert not story.said(StopEngine)
    story.on(ev.RouteDrained(story.engine("a").id))
    story.tick(4.9)
    assert not story.said(StopEngine)
    story.tick(0.1)
    assert story.said(StopEngine)
    story.exited("a", "stopped", expected=True)
    assert story.ever(KillAgent) == (KillAgent(NODE),)


def test_a_node_whose_block_has_ended_and_that_does_not_answer_is_given_up() -> None:
    story = serving(ends=4500.0)
    story.blocks(a_block(NODE, ends=4500.0, phase="lost", ended_at=story.now))
    story.on(ev.RouteDrained(story.engine("a").id))
    until(story, story.now + 29)
    assert story.ever(StopEngine)
    assert not story.ever(KillAgent)
    story.tick(1)
    assert story.said(KillAgent) == (KillAgent(NODE),)
    assert story.ever(CloseRoute)
    assert not story.fleet.nodes
    assert not story.fleet.engines


def test_a_node_that_stops_only_slowly_is_not_given_up_while_its_block_lives() -> None:
    story = serving(ends=4500.0)
    until(story, 4800.0)
    assert story.ever(StopEngine)
    assert not story.ever(KillAgent)


# --- after a restart ---
WARM = ev.FoundServer(3, 1, "10.0.0.1:7", up=True, draining=False, in_flight=2, idle_s=0.0)
ENGINE = ev.FoundEngine("a-1-2", "a", (), 4096, 900.0, "10.0.0.1:7", True, 12.0)


def restarted(ends: float, *, ledger_first: bool) -> Story:
    story = Story(initial(a_policy(a_kind(most=2), **POLICY)))
    story.on(ev.CatalogChanged((a_model("a"), a_model("b"))))
    if ledger_first:
        story.blocks(a_block(NODE, starts=-1000.0, ends=ends))
    story.on(ev.Started(2, {"a": 3}, (WARM,), (NODE,)))
    story.join(NODE, engines=(ENGINE,))
    if not ledger_first:
        story.blocks(a_block(NODE, starts=-1000.0, ends=ends))
    return story


@pytest.mark.parametrize("ledger_first", [True, False])
def test_a_node_adopted_one_second_before_its_time_leaves_in_time(ledger_first: bool) -> None:
    story = restarted(1331.0, ledger_first=ledger_first)
    assert not story.ever(DrainRoute)
    story.tick(1)
    assert [drain.engine for drain in story.ever(DrainRoute)] == ["a-1-2"]
    story.on(ev.RouteDrained("a-1-2"))
    story.tick(200)
    assert not [stop for stop in story.ever(StopEngine) if stop.engine == "a-1-2"]


@pytest.mark.parametrize("ledger_first", [True, False])
def test_a_node_that_lives_past_its_end_is_leaving_and_nothing_loops(ledger_first: bool) -> None:
    story = restarted(500.0, ledger_first=ledger_first)
    assert [drain.engine for drain in story.ever(DrainRoute)] == ["a-1-2"]
    assert story.fleet.nodes[NODE].phase is NodePhase.LEAVING
    for _ in range(20):
        story.tick(0.1)
    assert len(story.ever(DrainRoute)) == 1
    assert not story.ever(StopEngine), "what is in flight has a moment"
    story.tick(5)
    assert [stop.engine for stop in story.ever(StopEngine)] == ["a-1-2"]
    story.on(ev.EngineExited("a-1-2", "stopped", True))
    assert story.ever(KillAgent) == (KillAgent(NODE),)
    story.blocks(a_block(NODE, ends=500.0, reason="again"))
    assert not story.said(KillAgent)


def test_a_node_that_ends_while_its_agent_is_away_leaves_when_it_is_back() -> None:
    story = serving(ends=4500.0)
    until(story, 4000.0)
    story.on(ev.NodeGone(NODE, "killed", node_alive=True))
    story.tick(171)
    assert story.said(DrainRoute), "the edge can be told all the same"
    engine = story.engine("a")
    found = ev.FoundEngine(engine.id, "a", (), 4096, engine.started, engine.address, True, 10.0)
    story.join(NODE, engines=(found,))
    assert story.fleet.nodes[NODE].phase is NodePhase.LEAVING
    story.drained("a")
    assert [stop.reason for stop in story.said(StopEngine)] == ["node-ends"]
