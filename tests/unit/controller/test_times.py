"""Times told by the wall clock, as the core has them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway_plugin.clock import SteadyClock
from gateway_plugin.phases import BlockPhase
from serve.controller.times import BlockTimes, agents_event
from serve.core.events import EngineListening, FoundEngine, NodeJoined, NodeLeaves, SeenBlock

NOON = 1_700_000_000.0
STEPS = pytest.mark.parametrize("step_s", [3.0, 3600.0, -3600.0])
BLOCK = SeenBlock("gw-a-1", "a", BlockPhase.RUNNING, NOON - 90, job="7", starts_at=NOON - 60, ends_at=NOON + 3600)


class Clocks:
    def __init__(self) -> None:
        self.wall = NOON
        self.steady = SteadyClock(lambda: self.wall, lambda: 50.0)


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def joined(started: float) -> NodeJoined:
    engine = FoundEngine("e1", "m", (), 1, started, "127.0.0.1:9", True, 5.0)
    return NodeJoined("n", "a", "", "127.0.0.1", 1024, (), (engine,))


@STEPS
def test_an_engine_is_as_old_as_its_agent_says(clocks: Clocks, step_s: float) -> None:
    clocks.wall += step_s
    told = agents_event(joined(clocks.wall - 20), clocks.steady)
    assert isinstance(told, NodeJoined)
    assert told == joined(NOON - 20)


def test_no_engine_has_started_later_than_now(clocks: Clocks) -> None:
    assert agents_event(joined(NOON + 500), clocks.steady) == joined(NOON)


@STEPS
def test_a_notice_lasts_as_long_as_its_block_says(clocks: Clocks, step_s: float) -> None:
    clocks.wall += step_s
    assert agents_event(NodeLeaves("n", clocks.wall + 20, "told"), clocks.steady) == NodeLeaves("n", NOON + 20, "told")


def test_a_notice_from_before_the_clock_was_set_is_over(clocks: Clocks) -> None:
    clocks.wall += 3600
    assert agents_event(NodeLeaves("n", NOON + 20, "told"), clocks.steady) == NodeLeaves("n", NOON, "told")


def test_other_events_are_passed_on(clocks: Clocks) -> None:
    assert agents_event(EngineListening("e", "x"), clocks.steady) == EngineListening("e", "x")


@STEPS
def test_a_block_that_is_known_ends_when_it_was_said_to(clocks: Clocks, step_s: float) -> None:
    times = BlockTimes(clocks.steady)
    assert times.convert((BLOCK,)) == (BLOCK,)
    clocks.wall += step_s
    assert times.convert((BLOCK,)) == (BLOCK,)


@STEPS
def test_what_the_ledger_says_anew_is_taken_by_its_distance_from_now(clocks: Clocks, step_s: float) -> None:
    times = BlockTimes(clocks.steady)
    times.convert((BLOCK,))
    clocks.wall += step_s
    fresh = SeenBlock("gw-a-2", "a", BlockPhase.PENDING, clocks.wall - 1, starts_at=clocks.wall + 30)
    longer = replace(BLOCK, ends_at=clocks.wall + 7201)
    assert times.convert((longer, fresh)) == (
        replace(BLOCK, ends_at=NOON + 7201),
        SeenBlock("gw-a-2", "a", BlockPhase.PENDING, NOON - 1, starts_at=NOON + 30),
    )


def test_a_block_of_before_the_clock_was_set_back_is_not_from_the_future(clocks: Clocks) -> None:
    """As a controller finds it that starts afterwards."""
    (found,) = BlockTimes(clocks.steady).convert((replace(BLOCK, asked_at=NOON + 3000, ended_at=NOON + 3500),))
    assert (found.asked_at, found.ended_at) == (NOON, NOON)
