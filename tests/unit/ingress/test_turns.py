"""Suspects that take long and newcomers that do not end: both have their turns."""

from __future__ import annotations

import heapq

import pytest

from serve.ingress.trials import OPEN_S, QUIET_S, TURN_S, Trials

SUSPECTS = 30
WAIT_MAX_S = 1800.0


def steady(*, every_s: float, newcomer_s: float, suspect_s: float) -> tuple[list[float], list[float]]:
    """How long suspects waited for their answers, and newcomers, who come ``every_s``, for their turn."""
    trials, now, came = Trials(), 0.0, 0.0
    for number in range(SUSPECTS):
        trials.come(number, f"suspect-{number}", now)
        trials.died(number, now, now, apart=False)
    arrivals: dict[int, float] = {}
    ends: list[tuple[float, int]] = []
    suspects: list[float] = []
    newcomers: list[float] = []
    while len(suspects) < SUSPECTS and now < 2 * WAIT_MAX_S:
        if now >= came:
            arrivals[number := SUSPECTS + len(arrivals)] = now
            trials.come(number, f"newcomer-{number}", now)
            came += every_s
        while ends and ends[0][0] <= now:
            ticket = heapq.heappop(ends)[1]
            trials.answered(ticket, now)
            suspects += [now] if ticket < SUSPECTS else []
        for ticket in trials.admit(now):
            heapq.heappush(ends, (now + (suspect_s if ticket < SUSPECTS else newcomer_s), ticket))
            newcomers += [now - arrivals[ticket]] if ticket >= SUSPECTS else []
        at = trials.next_at(now)
        now = min([came, *[end for end, _ in ends[:1]], *([at] if at is not None else [])])
    return suspects, newcomers


@pytest.mark.parametrize("answer_s", [5.0, 16.0, 20.0, 40.0, 60.0])
@pytest.mark.parametrize("every_s", [1.0, 5.0])
def test_suspects_are_tried_however_long_answers_take(answer_s: float, every_s: float) -> None:
    suspects, newcomers = steady(every_s=every_s, newcomer_s=answer_s, suspect_s=answer_s)
    assert len(suspects) == SUSPECTS
    assert max(suspects) < WAIT_MAX_S
    assert max(newcomers) <= max(QUIET_S, answer_s) + answer_s


@pytest.mark.parametrize("suspect_s", [30.0, 80.0])
def test_suspects_take_half_of_the_time_at_most(suspect_s: float) -> None:
    suspects, newcomers = steady(every_s=2.0, newcomer_s=1.0, suspect_s=suspect_s)
    assert len(suspects) == SUSPECTS
    assert sum(wait > OPEN_S for wait in newcomers) <= 0.55 * len(newcomers)
    assert max(newcomers) <= suspect_s + QUIET_S


def test_short_trials_follow_one_another_and_nobody_waits_where_no_newcomer_is() -> None:
    assert max(steady(every_s=1000.0, newcomer_s=1.0, suspect_s=0.5)[0]) < TURN_S
    assert max(steady(every_s=1000.0, newcomer_s=1.0, suspect_s=80.0)[0]) < 1000.0, "no turn is kept for nobody"


def test_a_turn_of_newcomers_does_not_count_what_the_next_engine_took_to_load() -> None:
    trials = Trials()
    trials.come(1, "suspect", 0.0)
    trials.died(1, 0.0, 0.0, apart=False)
    assert trials.admit(10.0) == (1,)
    trials.come(2, "newcomer", 11.0)
    trials.came_back(1, 20.0)
    trials.died(1, 20.0, 80.0, apart=True)
    assert trials.admit(80.0) == (2,)
    trials.answered(2, 81.0)
    assert trials.admit(89.9) == (), "theirs are ten seconds as well, and one of them may come again"
    assert trials.next_at(89.9) == 90.0
    assert trials.admit(90.0) == (1,)
