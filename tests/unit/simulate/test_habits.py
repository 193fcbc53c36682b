"""What pressure against possession is made of."""

from __future__ import annotations

import pytest

from serve.simulate.habits import Habits, Numbers


def test_pressure_is_seconds_waited_and_grows_with_the_oldest() -> None:
    assert Numbers(impatience=0.0).pressure([30.0, 10.0], load_s=60.0) == 40.0
    assert Numbers(impatience=1.0).pressure([30.0, 10.0], load_s=60.0) == 60.0


def test_the_bound_leaves_time_for_the_load() -> None:
    numbers = Numbers(bound_loads=4.0, bound_s=60.0)

    assert not numbers.overdue(224.0, load_s=75.0)
    assert numbers.overdue(225.0, load_s=75.0)  # 225 + 75 = 4 loads
    assert numbers.overdue(59.0, load_s=1.0)


def test_the_loss_of_a_place_is_one_load_and_half_of_what_comes_during_it() -> None:
    assert Numbers.loss(0.5, rate=0.1, load_s=60.0) == 0.5 * 60 * (1 + 3)


def test_a_model_in_a_burst_is_likely_and_one_past_its_burst_is_not() -> None:
    habits = Habits(Numbers())
    now = 0.0
    for _ in range(10):  # ten requests 2 s apart, every 1,000 s
        for _ in range(10):
            habits.asked("8b-1", now)
            now += 2.0
        now += 980.0
    habits.asked("8b-1", now)

    assert habits.likely("8b-1", 10.0, now) > 0.85
    assert habits.likely("8b-1", 60.0, now + 60.0) < 0.2
    assert habits.likely("8b-1", 60.0, now + 950.0) > 0.8
    assert habits.likely("never-asked", 1e9, now) == 0.0


def test_only_the_last_gaps_count() -> None:
    habits = Habits(Numbers(gaps=4, fast_s=1.0, slow_s=1.0))
    for number in range(10):
        habits.asked("m", 100.0 * number)
    for number in range(5):
        habits.asked("m", 1000.0 + number)

    # all four remembered gaps are 1 s: nothing says that it is asked after longer
    assert habits.likely("m", 1.0, 1004.0) == pytest.approx(1.0, abs=0.1)
    assert habits.likely("m", 200.0, 1104.0) == pytest.approx(0.0, abs=0.01)


def test_those_who_waited_are_not_counted_again_by_the_counters() -> None:
    habits = Habits(Numbers())
    habits.asked("m", 10.0)
    habits.used("m", last_used=40.2, ready_at=40.0, now=41.0)
    once = habits.rate("m", 41.0)
    habits.used("m", last_used=50.0, ready_at=40.0, now=51.0)

    assert habits.rate("m", 51.0) > once
