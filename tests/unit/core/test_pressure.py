"""Switching by weight: a bound on waits, a quantum, the value of what is idle, and what is said of it."""

from __future__ import annotations

from serve.core import events as ev
from serve.core.effects import CreateAgent, DrainRoute, StartEngine
from serve.core.habits import Habit, likely, noted
from serve.core.policies import pressure
from serve.core.state import Action
from serve.core.step import DEFAULT
from serve.core.transaction import Transaction
from serve.core.weighing import weighing
from tests.support.fleets import Story, a_kind, a_model, a_policy, begin


def hot_and_cold(load_s: float = 3.0, **fields: float) -> Story:
    """``hot`` serves and is never idle; ``cold`` needs its room. Loads take 3 s here."""
    story = begin(a_model("hot"), a_model("cold"), policy=a_policy(**fields))
    story.ask("hot")
    story.got_ready("hot", after=load_s)
    story.opened("hot")
    return story


def seconds_until_drained(story: Story, most: int) -> int | None:
    """``hot`` has eight requests in flight at every reading of the counters."""
    for second in range(1, most + 1):
        story.seen("hot", in_flight=8, after=1)
        if story.said(DrainRoute):
            return second
    return None


def test_a_busy_model_makes_way_before_the_bound_of_another_is_passed() -> None:
    story = hot_and_cold()
    story.ask("cold", wait_s=120)
    drained_after = seconds_until_drained(story, 60)
    assert drained_after is not None
    assert drained_after + 3 + 5 <= 60, "its load and a drain still fit into the bound"


def test_the_bound_is_four_loads_where_these_are_longer() -> None:
    story = hot_and_cold(load_s=100.0)
    tx = Transaction(story.fleet, story.now, DEFAULT)
    assert pressure.weight(tx, "cold").bound_s == 400


def test_a_pinned_model_is_the_exception_to_the_bound() -> None:
    story = hot_and_cold()
    story.on(ev.PinChanged("hot", True))
    story.ask("cold")
    assert seconds_until_drained(story, 300) is None
    assert "No engine may go" in weighing(story.fleet, "cold", story.now)[1]


def test_room_that_drains_for_one_is_not_given_to_another_that_weighs_more() -> None:
    story = begin(a_model("hot", 4), a_model("cold", 4), a_model("crowd", 4))
    story.ask("hot")
    story.loaded("hot")
    story.ask("cold")
    assert seconds_until_drained(story, 240) is not None
    for _ in range(50):
        story.ask("crowd")
    story.tick(1)
    story.drained("hot")
    story.exited("hot", expected=True)
    assert [start.model.name for start in story.ever(StartEngine)] == ["hot", "cold"]


def test_of_two_idle_models_the_one_that_is_asked_again_and_again_stays() -> None:
    story = begin(a_model("often", 3), a_model("once", 3), a_model("new", 3))
    for model in ("often", "once"):
        story.ask(model)
        story.loaded(model)
    for _ in range(12):
        story.used("once") if story.now < 1040 else None
        story.tick(20)
        story.used("often")
    story.tick(10)  # "once" has been idle for longer, and "often" is due
    story.ask("new")
    for _ in range(30):
        story.tick(1)
    assert [drain.engine for drain in story.ever(DrainRoute)] == [story.engine("once").id]


def test_a_decision_is_told_with_its_numbers() -> None:
    story = hot_and_cold()
    story.ask("cold")
    said = weighing(story.fleet, "cold", story.now)
    assert said[0].startswith("Its waiter weighs 5 s")
    assert seconds_until_drained(story, 60) is not None
    evicted = [one for one in story.fleet.decisions if one.action is Action.EVICT]
    assert [(one.model, one.other) for one in evicted] == [("hot", "cold")]
    assert "'cold' waits: its waiter weighs" in evicted[0].because


def test_pauses_tell_how_likely_a_model_is_asked() -> None:
    habit: Habit | None = None
    now = 0.0
    for _ in range(40):
        now += 100.0
        habit = noted(habit, now, paused=True)
    assert likely(habit, 20.0, now + 10) < 0.3, "it is asked every 100 s, and was asked just now"
    assert likely(habit, 20.0, now + 95) > 0.4
    assert likely(habit, 200.0, now) > 0.9
    assert likely(None, 1e9, now) == 0


def test_what_is_known_of_a_model_does_not_grow() -> None:
    habit: Habit | None = None
    for index in range(500):
        habit = noted(habit, index * 7.0, paused=index % 3 > 0)
    assert habit is not None
    assert len(habit.pauses) == len(noted(None, 0.0, paused=True).pauses)
    assert sum(habit.pauses) < 51


def test_a_node_is_asked_for_where_what_is_idle_stays_too_valuable_for_long() -> None:
    kind = a_kind(most=2)
    story = begin(a_model("hot"), a_model("cold"), policy=a_policy(kind))
    story.ask("hot")
    story.loaded("hot", after=300.0)
    for _ in range(100):
        story.used("hot", after=4.0)
    story.tick(4)  # idle, but needed again soon, and long to load
    story.ask("cold", wait_s=600)
    for _ in range(59):
        story.tick(1)
    assert not story.ever(CreateAgent), "it is about to outweigh that"
    for _ in range(10):
        story.tick(1)
    assert not story.ever(DrainRoute)
    assert len(story.ever(CreateAgent)) == 1
