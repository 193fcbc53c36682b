"""Given what was seen, what does the supervisor do? Stories over ``plan.decide``, with clocks as arguments."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from gateway_plugin.processes import Mark
from gateway_plugin.service.restart_policy import (
    BACK_OFF_MAX_S,
    BUSY_LIMIT_S,
    DEPLOY_LIMIT_S,
    HEAD_START_LIMIT_S,
    HEALTHY_S,
    NOT_READY_LIMIT_S,
    Action,
    Part,
    PartName,
    Phase,
    Plan,
    Seen,
    adopted,
    back_off_s,
    could_not_start,
    decide,
    with_mark,
)

ALL_WELL = Seen(edge_alive=True, edge_answers=True, head_alive=True, head_answers=True, deploy_ok=True, ready=True)


def running(since: float = 0.0) -> Plan:
    part = Part(Phase.RUNNING, Mark(1, 1.0), since=since)
    return Plan(edge=part, head=part, serve=part)


def test_a_fresh_start_starts_edge_and_head_at_once_and_the_application_after_the_head() -> None:
    plan, actions = decide(Plan(), Seen(), now=0.0)
    assert actions == (Action.START_EDGE, Action.START_HEAD)

    plan, actions = decide(plan, Seen(edge_alive=True, head_alive=True), now=1.0)
    assert actions == ()

    plan, actions = decide(plan, Seen(edge_alive=True, edge_answers=True, head_alive=True, head_answers=True), now=2.0)
    assert plan.edge.phase is plan.head.phase is Phase.RUNNING
    assert actions == (Action.START_DEPLOY,)

    plan = with_mark(plan, PartName.SERVE, Mark(3, 3.0))
    plan, actions = decide(plan, replace(ALL_WELL, deploy_alive=True, deploy_ok=False, ready=False), now=3.0)
    assert (plan.serve.phase, actions) == (Phase.STARTING, ())

    plan, actions = decide(plan, ALL_WELL, now=4.0)
    assert (plan.serve.phase, actions) == (Phase.RUNNING, ())


def test_nothing_is_done_while_all_is_well() -> None:
    plan = running()
    for now in (1.0, 100.0, 10_000.0):
        plan, actions = decide(plan, ALL_WELL, now)
        assert actions == ()
    assert plan == running()


def test_an_edge_that_dies_is_started_with_the_next_look() -> None:
    plan, actions = decide(running(), replace(ALL_WELL, edge_alive=False, edge_end="killed by SIGKILL"), now=50.0)
    assert actions == ()
    assert plan.edge.error == "killed by SIGKILL"
    _, actions = decide(plan, replace(ALL_WELL, edge_alive=False), now=50.1)
    assert actions == (Action.START_EDGE,)


def test_an_edge_that_dies_again_and_again_waits_longer_and_longer() -> None:
    plan, now, starts = Plan(), 0.0, []
    while now < 120.0:
        plan, actions = decide(plan, Seen(edge_alive=False, head_alive=True), now)
        if Action.START_EDGE in actions:
            starts.append(now)
        now += 0.1
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert gaps == sorted(gaps)
    assert gaps[0] < 0.5
    assert gaps[-1] == pytest.approx(BACK_OFF_MAX_S, abs=0.5)


def test_deaths_are_forgiven_after_a_healthy_while() -> None:
    ill = replace(running(), edge=Part(Phase.RUNNING, Mark(1, 1.0), since=0.0, deaths=5))
    plan, _ = decide(ill, ALL_WELL, now=HEALTHY_S + 1)
    assert plan.edge.deaths == 0


@pytest.mark.parametrize("deaths", range(1, 50))
def test_back_off_is_bounded_and_never_shrinks(deaths: int) -> None:
    assert 0 <= back_off_s(deaths) <= back_off_s(deaths + 1) <= BACK_OFF_MAX_S


def test_a_dead_head_is_cleared_and_started_and_then_the_application_is_looked_at() -> None:
    plan, actions = decide(running(), replace(ALL_WELL, head_alive=False, ready=False), now=20.0)
    assert actions == (Action.END_HEAD,)
    assert plan.serve.phase is Phase.DOWN
    assert plan.edge.phase is Phase.RUNNING

    plan, actions = decide(plan, Seen(edge_alive=True, edge_answers=True), now=20.1)
    assert actions == (Action.START_HEAD,)

    _, actions = decide(plan, replace(ALL_WELL, ready=False), now=25.0)
    assert actions == (Action.START_DEPLOY,)


def test_the_head_dying_under_a_deployment_ends_the_driver() -> None:
    deploying = replace(running(), serve=Part(Phase.STARTING, Mark(9, 9.0), since=0.0))
    _, actions = decide(deploying, Seen(edge_alive=True, edge_answers=True, deploy_alive=True), now=5.0)
    assert actions == (Action.END_HEAD, Action.END_DEPLOY)


def test_a_head_that_never_answers_counts_as_dead() -> None:
    plan = replace(Plan(), head=Part(Phase.STARTING, Mark(1, 1.0), since=0.0))
    after, actions = decide(plan, Seen(edge_alive=True, head_alive=True), now=HEAD_START_LIMIT_S + 1)
    assert Action.END_HEAD in actions
    assert after.head.deaths == 1


def test_a_failed_deployment_is_tried_again_later() -> None:
    deploying = replace(running(), serve=Part(Phase.STARTING, Mark(9, 9.0), since=0.0, deaths=2))
    failed = replace(ALL_WELL, deploy_ok=False, deploy_end="exit code 1", ready=False)
    plan, actions = decide(deploying, failed, now=10.0)
    assert (plan.serve.phase, plan.serve.error, actions) == (Phase.DOWN, "exit code 1", ())
    assert decide(plan, failed, now=10.1)[1] == ()
    assert decide(plan, failed, now=10.0 + back_off_s(3))[1] == (Action.START_DEPLOY,)


def test_a_driver_that_hangs_is_ended() -> None:
    deploying = replace(running(), serve=Part(Phase.STARTING, Mark(9, 9.0), since=0.0))
    seen = replace(ALL_WELL, deploy_alive=True, deploy_ok=False, ready=False)
    _, actions = decide(deploying, seen, now=DEPLOY_LIMIT_S + 1)
    assert actions == (Action.END_DEPLOY,)


def test_an_application_that_stays_away_is_looked_at_again() -> None:
    plan, actions = decide(running(), replace(ALL_WELL, ready=False), now=100.0)
    assert (plan.serve.phase, actions) == (Phase.STARTING, ())
    assert decide(plan, replace(ALL_WELL, ready=False), now=101.0)[1] == ()
    _, actions = decide(plan, replace(ALL_WELL, ready=False), now=100.0 + NOT_READY_LIMIT_S + 1)
    assert actions == (Action.START_DEPLOY,)


def test_a_busy_application_is_left_alone() -> None:
    """It answered nothing for 70 s while a thousand streams passed through it, and was deployed again."""
    plan, busy = running(), replace(ALL_WELL, ready=False, busy=True)
    for now in range(100, 100 + int(BUSY_LIMIT_S), 10):
        plan, actions = decide(plan, busy, float(now))
        assert (plan.serve.phase, actions) == (Phase.RUNNING, ())
    plan, _ = decide(plan, ALL_WELL, now=800.0)
    plan, _ = decide(plan, busy, now=1_000.0)
    assert plan.serve.phase is Phase.RUNNING, "the earlier silence is over"


def test_silence_for_ever_is_no_business_and_a_part_that_died_is_none_at_once() -> None:
    busy = replace(ALL_WELL, ready=False, busy=True)
    plan, _ = decide(running(), busy, now=100.0)
    plan, _ = decide(plan, busy, now=101.0 + BUSY_LIMIT_S)
    assert plan.serve.phase is Phase.STARTING
    assert decide(plan, busy, now=102.0 + BUSY_LIMIT_S + NOT_READY_LIMIT_S)[1] == (Action.START_DEPLOY,)

    plan, _ = decide(running(), busy, now=100.0)
    plan, _ = decide(plan, replace(busy, busy=False), now=101.0)
    assert plan.serve.phase is Phase.STARTING


def test_what_lives_is_adopted_and_not_started_again() -> None:
    plan = adopted(Mark(1, 1.0), Mark(2, 2.0), now=5.0)
    plan, actions = decide(plan, ALL_WELL, now=5.1)
    assert actions == (Action.START_DEPLOY,)  # it finds the application and leaves
    assert plan.edge.mark == Mark(1, 1.0)


def test_a_program_that_cannot_be_started_at_all_is_tried_again_later() -> None:
    plan, _ = decide(Plan(), Seen(head_alive=True), now=0.0)
    plan = could_not_start(plan, PartName.EDGE, "no such file", now=0.0)
    assert plan.edge.error == "no such file"
    plan = could_not_start(plan, PartName.EDGE, "no such file", now=0.0)
    assert Action.START_EDGE not in decide(plan, Seen(head_alive=True), now=0.1)[1]
