"""A clock that passes evenly while the wall clock is set."""

from __future__ import annotations

import pytest

from gateway_plugin.clock import SteadyClock

NOON = 1_700_000_000.0


class Clocks:
    """Both clocks of a machine, in hand."""

    def __init__(self) -> None:
        self.wall, self.monotonic = NOON, 50.0
        self.steady = SteadyClock(lambda: self.wall, lambda: self.monotonic)

    def passes(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def test_it_is_the_wall_clock_until_that_is_set(clocks: Clocks) -> None:
    assert clocks.steady.now() == NOON
    clocks.passes(5)
    assert clocks.steady.now() == NOON + 5
    assert clocks.steady.steady(NOON + 65) == NOON + 65
    assert clocks.steady.wall(NOON + 65) == NOON + 65


@pytest.mark.parametrize("step_s", [3.0, 3600.0, -3600.0])
def test_a_set_clock_changes_nothing_but_how_others_tell_the_time(clocks: Clocks, step_s: float) -> None:
    clocks.wall += step_s
    clocks.passes(1)
    assert clocks.steady.now() == NOON + 1
    in_a_minute = clocks.wall + 60
    assert clocks.steady.steady(in_a_minute) == clocks.steady.now() + 60
    assert clocks.steady.wall(clocks.steady.now() + 60) == in_a_minute


def test_what_happened_already_was_not_later_than_now(clocks: Clocks) -> None:
    told = clocks.wall - 10
    clocks.wall -= 3600
    now = clocks.steady.now()
    assert clocks.steady.steady(told, latest=now) == now
    assert clocks.steady.steady(clocks.wall - 10, latest=now) == now - 10


def test_a_slight_difference_is_none(clocks: Clocks) -> None:
    """Else the same time, told again, would be another one."""
    clocks.wall += 0.01
    assert clocks.steady.steady(NOON + 60) == NOON + 60
