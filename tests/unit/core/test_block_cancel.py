"""``gateway blocks cancel`` in the core: the node goes at once, and nobody asks for another in its place by mistake."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway_plugin.phases import BlockPhase
from serve.core.effects import CloseRoute, CreateAgent, KillAgent, StopEngine
from serve.core.events import BlockCancelAsked, BlocksSeen, CatalogChanged, SeenBlock, Started, WaiterLeft
from serve.core.state import NodePhase
from serve.core.step import initial
from tests.support.fleets import Story, a_kind, a_model, a_policy, begin


def pending(name: str) -> SeenBlock:
    return SeenBlock(name, "cpu", BlockPhase.PENDING, asked_at=0.0)


def test_a_running_block_goes_with_what_is_in_flight_and_its_route_closes_before_its_agent_is_killed() -> None:
    story = begin(a_model("a"))
    story.ask("a")
    story.loaded("a")
    story.seen("a", in_flight=2)
    effects = story.on(BlockCancelAsked("block-cpu-0-0"))
    assert [type(effect) for effect in effects] == [CloseRoute, KillAgent]
    assert story.said(KillAgent) == (KillAgent("cpu-0-0"),)
    assert story.said(StopEngine) == ()  # nobody is left to be told
    assert not story.fleet.nodes
    assert not story.fleet.engines


def test_a_pending_block_takes_one_pending_node_with_it_so_that_ray_does_not_ask_again() -> None:
    story = begin(a_model("a"), a_model("b"), nodes=(), policy=a_policy(a_kind(most=2)))
    left = story.ask("a")
    story.tick(5)
    story.ask("b")
    story.tick(5)
    first, second = (effect.node for effect in story.ever(CreateAgent))
    story.on(BlocksSeen((pending("b1"), pending("b2"))))
    story.on(WaiterLeft(left))
    story.tick(1)  # from here on nobody needs one of the two
    (unneeded,) = [node.id for node in story.fleet.nodes.values() if node.idle_since is not None]
    story.on(BlockCancelAsked("b1"))
    assert story.said(KillAgent) == (KillAgent(unneeded),)
    assert set(story.fleet.nodes) == {first, second} - {unneeded}


@pytest.mark.parametrize("phase", ["cancelling", "cancelled"])
def test_a_block_that_is_cancelled_once_more_takes_no_second_node_with_it(phase: str) -> None:
    """Another pending node of its type is somebody else's: it would lose its place in the queue."""
    story = begin(a_model("a"), a_model("b"), nodes=(), policy=a_policy(a_kind(most=2)))
    story.ask("a")
    story.tick(5)
    story.ask("b")
    story.tick(5)
    story.on(BlocksSeen((pending("b1"), pending("b2"))))
    story.on(BlockCancelAsked("b1"))
    story.on(BlocksSeen((replace(pending("b1"), phase=BlockPhase(phase)), pending("b2"))))
    before = set(story.fleet.nodes)
    story.on(BlockCancelAsked("b1"))
    assert story.said(KillAgent) == ()
    assert set(story.fleet.nodes) == before


def test_of_pending_nodes_that_are_all_needed_the_youngest_goes() -> None:
    story = begin(a_model("a"), a_model("b"), nodes=(), policy=a_policy(a_kind(most=2)))
    story.ask("a")
    story.tick(5)
    story.ask("b")
    story.tick(5)
    _, youngest = (effect.node for effect in story.ever(CreateAgent))
    story.on(BlocksSeen((pending("b1"), pending("b2"))))
    story.on(BlockCancelAsked("b1"))
    assert story.said(KillAgent) == (KillAgent(youngest),)


def test_a_block_of_another_type_or_an_unknown_one_takes_nothing_with_it() -> None:
    story = begin(a_model("a"), nodes=())
    story.ask("a")
    story.tick(5)
    story.on(BlocksSeen((SeenBlock("g1", "gpu", BlockPhase.PENDING, asked_at=0.0),)))
    for name in ("g1", "nobody"):
        story.on(BlockCancelAsked(name))
        assert story.said(KillAgent) == ()
    assert len(story.fleet.nodes) == 1


def test_a_node_that_has_not_reported_after_a_restart_is_not_taken_for_a_pending_one() -> None:
    story = Story(initial(a_policy()))
    story.on(CatalogChanged((a_model("a"),)))
    story.on(Started(2, {}, (), ("cpu-1-1",)))
    assert story.fleet.nodes["cpu-1-1"].phase is NodePhase.PENDING
    story.on(BlocksSeen((pending("b1"),)))
    story.on(BlockCancelAsked("b1"))
    assert story.said(KillAgent) == ()
