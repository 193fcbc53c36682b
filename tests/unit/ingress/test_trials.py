"""One request that kills its engine takes nobody down with it: the shapes in which that happens, and the rules."""

from __future__ import annotations

import random

import pytest

from serve.ingress.trials import (
    DEATHS_MAX,
    EXCLUSIVE_S,
    KILLS_MAX,
    MEMORY_S,
    OPEN_S,
    QUIET_S,
    RECORDS_MAX,
    SUSPECT_S,
    Trials,
)
from tests.unit.ingress.poison import HANG_AFTER_S, Gateway


def warm(gateway: Gateway) -> None:
    gateway.ask("warm", 0.1)
    gateway.run(10)
    assert gateway.serves()


def beside_thirty(*, old: bool = False) -> Gateway:
    """One poison beside thirty innocents, and the next thirty."""
    gateway = Gateway(old=old)
    warm(gateway)
    for number in range(30):
        gateway.ask(f"innocent-{number}", 1.0)
    gateway.ask("poison", 0.5, kills=True)
    for number in range(30):
        gateway.ask(f"next-{number}", 1.0, after=3.0 + number / 10)
    gateway.run(600)
    return gateway


def every_five_seconds(*, same: bool, old: bool = False) -> Gateway:
    """Ten requests a second for thirty seconds, and a poison every five."""
    gateway = Gateway(old=old)
    warm(gateway)
    for number in range(300):
        gateway.ask(f"innocent-{number}", 0.5, after=number / 10)
    for number in range(6):
        gateway.ask("poison" if same else f"poison-{number}", 0.2, after=2.0 + 5.0 * number, kills=True)
    gateway.run(900)
    return gateway


def with_retries(*, old: bool = False) -> Gateway:
    """One poison sent three times by a client that sees a failure each time, and ten innocents."""
    gateway = Gateway(old=old)
    warm(gateway)
    for number in range(10):
        gateway.ask(f"innocent-{number}", 1.0, after=number)
    poison = gateway.ask("poison", 0.2, after=0.5, kills=True)
    for _ in range(2):
        while not poison.result:
            gateway.run(0.25)
        poison = gateway.ask("poison", 0.2, after=0.5, kills=True)
    gateway.run(600)
    return gateway


def test_a_poison_beside_thirty_is_the_only_one_refused() -> None:
    gateway = beside_thirty()
    assert gateway.results() == {"answered": 61}
    assert gateway.results(kills=True) == {"request_killed_engine": 1}
    assert gateway.kills["poison"] <= KILLS_MAX


@pytest.mark.parametrize("same", [True, False])
def test_a_poison_every_five_seconds_costs_no_innocent_its_answer(same: bool) -> None:
    gateway = every_five_seconds(same=same)
    assert gateway.results() == {"answered": 301}
    assert gateway.results(kills=True) == {"request_killed_engine": 6}
    assert max(gateway.kills.values()) <= KILLS_MAX


def test_a_poison_that_is_sent_again_is_refused_before_it_kills_again() -> None:
    gateway = with_retries()
    assert gateway.results() == {"answered": 11}
    assert gateway.results(kills=True) == {"request_killed_engine": 3}
    assert gateway.kills["poison"] <= KILLS_MAX


def test_the_rule_of_two_deaths_refuses_innocents() -> None:
    """The world can tell a good rule from a bad one."""
    assert beside_thirty(old=True).results()["request_killed_engine"] >= 30
    assert every_five_seconds(same=False, old=True).results()["answered"] < 301


@pytest.mark.parametrize("seed", range(60))
def test_no_innocent_is_found_guilty_and_no_poison_kills_more_than_it_may(seed: int) -> None:
    chance = random.Random(seed)
    gateway = Gateway()
    warm(gateway)
    for number in range(chance.randint(1, 4)):
        lasts_s = chance.choice((0.01, 0.3, 3.0, 30.0))
        gateway.ask(f"poison-{number}", lasts_s, after=chance.uniform(0, 20), kills=True)
    for number in range(chance.randint(1, 60)):
        body = f"innocent-{number if chance.random() < 0.7 else 0}"
        gateway.ask(body, chance.choice((0.05, 0.5, 5.0, 40.0)), after=chance.uniform(0, 30))
    gateway.run(3000)
    assert gateway.results()["request_killed_engine"] == 0
    assert gateway.results()[""] == 0, "everybody is answered"
    assert set(gateway.results(kills=True)) <= {"request_killed_engine", "engine_died_often"}
    assert max(gateway.kills.values()) <= KILLS_MAX


@pytest.mark.parametrize("model", ["hangs", "loads long"])
def test_a_poison_is_found_though_its_engine_hangs_or_the_next_one_loads_long(model: str) -> None:
    load_s, kills_after_s = {"hangs": (30.0, HANG_AFTER_S + 12.0), "loads long": (400.0, 0.5)}[model]
    gateway = Gateway(load_s=load_s)
    gateway.ask("warm", 0.1)
    gateway.run(load_s + 10)
    gateway.ask("poison", kills_after_s, kills=True)
    for number in range(600):
        gateway.ask(f"innocent-{number}", 1.0, after=5.0 * number)
    gateway.run(6000)
    assert gateway.results(kills=True) == {"request_killed_engine": 1}
    assert gateway.kills["poison"] <= KILLS_MAX
    assert gateway.results() == {"answered": 601}


def test_others_that_go_while_the_next_engine_loads_are_no_alibi() -> None:
    trials = suspects(1)
    for now in (1.0, 500.0):
        assert trials.admit(now) == (1,)
        trials.came_back(1, now)
        trials.come(2, "newcomer", now)
        assert trials.admit(now + trials.exclusive_s) == (2,)
        trials.died(1, now, now + 200.0, apart=True)
        trials.answered(2, now + 200.0)
    assert trials.guilty(1)


def test_who_goes_again_is_alone_if_nobody_else_is_under_way_then() -> None:
    for others, alone in ((True, False), (False, True)):
        trials = suspects(1)
        assert trials.admit(1.0) == (1,)
        trials.came_back(1, 1.0)
        trials.come(2, "newcomer", 2.0)
        assert trials.admit(1.0 + trials.exclusive_s) == (2,)
        if not others:
            trials.answered(2, 100.0)
        trials.goes(1)
        trials.died(1, 101.0, 101.0, apart=True)
        trials.left(2, 102.0)
        kill_alone(trials, 1, 110.0)
        assert trials.guilty(1) is alone


def suspects(*tickets: int, now: float = 0.0) -> Trials:
    """An engine died that had these, at ``now``."""
    trials = Trials()
    for ticket in tickets:
        trials.come(ticket, f"body-{ticket}", now)
        trials.died(ticket, now, now, apart=False)
    return trials


def kill_alone(trials: Trials, ticket: int, now: float) -> None:
    assert trials.admit(now) == (ticket,)
    trials.died(ticket, now, now, apart=True)


def test_a_guilty_body_is_remembered_for_a_while() -> None:
    trials = suspects(1)
    for now in (1.0, 2.0):
        assert not trials.guilty(1)
        kill_alone(trials, 1, now)
    assert trials.guilty(1)
    assert trials.admit(3.0) == (1,), "it need not wait for that"
    trials.left(1, 3.0)
    trials.come(2, "body-1", 2.0 + MEMORY_S - 0.1)
    assert trials.guilty(2)
    trials.left(2, 2.0 + MEMORY_S - 0.1)
    trials.come(3, "body-1", 2.0 + MEMORY_S)
    assert not trials.guilty(3)


def test_a_suspect_is_remembered_while_it_is_here_and_a_little_longer() -> None:
    trials = suspects(1)
    assert trials.remembers(10 * SUSPECT_S)
    trials.left(1, 10 * SUSPECT_S)
    assert trials.remembers(11 * SUSPECT_S - 0.1), "its client may send it again"
    assert not trials.remembers(11 * SUSPECT_S)
    trials = suspects(1)
    trials.admit(OPEN_S)
    trials.answered(1, OPEN_S + 1)
    assert not trials.remembers(OPEN_S + 1)


def test_what_an_engine_died_of_that_others_may_have_used_does_not_count_as_alone() -> None:
    trials = suspects(1)
    for now in (1.0, 2.0, 3.0):
        assert trials.admit(now) == (1,)
        trials.died(1, now, now, apart=False)
    assert not trials.guilty(1)


def test_one_death_counts_once_for_many_requests_with_one_body() -> None:
    trials = Trials()
    for ticket in range(DEATHS_MAX):
        trials.come(ticket, "same", 0.0)
        trials.died(ticket, 5.0 + ticket / 1e6, 6.0, apart=True)  # the wall clock's time of it jitters
    assert not trials.worn_out(0)
    assert len(trials.admit(7.0)) == 3, "a cohort, since one death was seen"


def test_a_body_that_engines_die_with_again_and_again_is_given_up() -> None:
    trials = suspects(1)
    for now in range(1, DEATHS_MAX):
        assert not trials.worn_out(1)
        trials.died(1, float(now), float(now), apart=False)
    assert trials.worn_out(1)
    assert not trials.guilty(1)
    assert trials.admit(20.0) == (1,)
    assert not trials.under_way(1)


def test_memory_is_bounded() -> None:
    trials = suspects(*range(RECORDS_MAX + 50))
    assert not trials.suspect(49)
    assert trials.suspect(50)


def test_newcomers_wait_for_a_trial_and_for_quiet_but_not_for_ever() -> None:
    trials = suspects(1, 2)
    trials.come(10, "long", 0.0)
    assert trials.admit(0.0) == (10,), "newcomers have their turn after a death"
    trials.come(11, "next", OPEN_S)
    assert trials.admit(OPEN_S) == (), "held back until nothing is under way"
    assert trials.next_at(OPEN_S) == OPEN_S + QUIET_S
    assert trials.admit(OPEN_S + QUIET_S) == (11,), "that takes too long"
    for ticket in (10, 11):
        trials.answered(ticket, 20.0)
    assert trials.admit(20.0) == (1, 2), "a cohort: the square root of two, and up"
    trials.come(12, "later", 21.0)
    assert trials.admit(21.0) == ()
    assert trials.next_at(21.0) == 20.0 + EXCLUSIVE_S
    assert trials.admit(20.0 + EXCLUSIVE_S) == (12,)


def test_who_was_answered_is_no_suspect() -> None:
    trials = suspects(1)
    assert trials.admit(1.0) == (1,)
    assert trials.answered(1, 2.0), "the first answer since an engine died"
    trials.come(2, "body-1", 3.0)
    assert not trials.suspect(2)
    assert trials.admit(3.0) == (2,)
    assert not trials.answered(2, 4.0)
