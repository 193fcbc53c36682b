"""What requesters do: an idle model whose only requesters wait for another one goes at once; those that are asked in
turn are kept together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.core import callers
from serve.core import events as ev
from serve.core.callers import CALLERS_MAX, Caller, after, share
from serve.core.effects import DrainRoute
from tests.support.fleets import Story, a_model, begin

ANN, BEN = ev.Requester("ann"), ev.Requester("ben")


def served(story: Story, model: str, *who: ev.Requester) -> None:
    """``model``, which is often asked for, loads for them; each gets an answer within a second."""
    for _ in range(8):
        story.on(ev.WaiterLeft(story.ask(model, requester=who[0], after=8.0)))
    for requester in who:
        story.ask(model, requester=requester)
    story.loaded(model, after=60.0)
    story.seen(model, in_flight=len(who), last_used=story.now)
    story.seen(model, last_used=story.now, after=1.0)


def one_place(*who: ev.Requester) -> Story:
    """``a`` was loaded and asked by ``who``; ``b`` needs its room."""
    story = begin(a_model("a", 4), a_model("b", 4))
    served(story, "a", *who)
    return story


def waits_s(story: Story, most: int = 60) -> int:
    """Seconds until something drains."""
    for second in range(most):
        if story.ever(DrainRoute):
            return second
        story.tick(1)
    return most


def test_the_model_whose_only_requester_waits_for_another_one_goes_at_once() -> None:
    story = one_place(ANN)
    story.ask("b", requester=ANN)
    assert waits_s(story) == 0


@pytest.mark.parametrize("by", [ev.Requester(), BEN, ev.Requester("ann", "a caller behind its key")])
def test_it_stays_for_a_while_where_the_one_who_waits_is_not_known_to_be_its_requester(by: ev.Requester) -> None:
    story = one_place(ANN)
    story.ask("b", requester=by)
    assert waits_s(story) > 5


def test_it_stays_where_not_all_of_its_requesters_wait() -> None:
    story = one_place(ANN, BEN)
    story.ask("b", requester=ANN)
    assert waits_s(story) > 5
    story = one_place(ANN, BEN)
    story.ask("b", requester=ANN)
    story.ask("b", requester=BEN)
    assert waits_s(story) <= 1


def test_it_stays_where_others_have_asked_it_since_past_the_controller() -> None:
    story = one_place(ANN)
    story.tick(10)
    story.seen("a", last_used=story.now, after=1)
    story.tick(5)
    story.ask("b", requester=ANN)
    assert waits_s(story) > 5


def test_it_stays_where_its_requester_is_several() -> None:
    """Two requests of one key wait at a time: what one waits for tells nothing of the other."""
    story = one_place(ANN, ANN)
    story.ask("b", requester=ANN)
    assert waits_s(story) > 5


def test_what_is_remembered_of_requesters_is_bounded() -> None:
    story = begin(a_model("a", 4))
    for number in range(CALLERS_MAX + 10):
        story.ask("a", requester=ev.Requester(f"k{number}"))
    assert len(story.fleet.callers) == CALLERS_MAX
    assert "k9 " not in story.fleet.callers
    assert f"k{CALLERS_MAX + 9} " in story.fleet.callers


def test_which_model_a_requester_asks_after_another() -> None:
    story = begin(a_model("a", 4), a_model("b", 4))
    for model in ("a", "b", "a", "b", "a"):
        story.ask(model, requester=ANN)
        story.on(ev.WaiterLeft(f"t{story.tickets}"))
    assert share(story.fleet.follows["a"], "b") > 0.5
    assert share(story.fleet.follows["a"], "a") == 0.0


def test_the_more_often_the_more_surely_and_the_last_times_count_most() -> None:
    known: callers.Next = ()
    assert share(known, "b") == 0.0
    for _ in range(10):
        known = after(known, "b")
    assert share(known, "b") > 0.8
    for _ in range(20):
        known = after(known, "c")
    assert share(known, "b") < 0.2
    for number in range(50):
        known = after(known, f"m{number}")
    assert len(known) < 10


def test_a_request_long_after_another_is_not_of_the_same_workflow() -> None:
    assert callers.turn(Caller("a", 0.0, "t1"), 60.0) == "a"
    assert callers.turn(Caller("a", 0.0, "t1"), 3600.0) == ""
    assert callers.turn(Caller("a", 0.0, "t1", crowd_until=100.0), 60.0) == ""


@pytest.mark.parametrize("how", ["", "learned", "catalog"])
def test_models_that_a_workflow_asks_in_turn_are_kept_together(how: str) -> None:
    """``a`` and ``c`` have the room; ``a`` was used before ``c``, and goes for ``b`` unless it comes after ``b``."""
    group = "w" if how == "catalog" else ""
    story = begin(a_model("a", 3, group=group), a_model("b", 3, group=group), a_model("c", 3))
    if how == "learned":
        story.fleet = replace(story.fleet, follows={"b": (("a", 5.0),)})
    for model in ("a", "c"):
        served(story, model, BEN)
    story.tick(300)
    story.ask("b", requester=ANN)
    assert waits_s(story) < 60
    (gone,) = story.ever(DrainRoute)
    assert gone.engine == story.engine("a" if how == "" else "c").id


def test_another_group_starts_nothing_afresh() -> None:
    story = one_place(ANN)
    story.on(ev.CatalogChanged((a_model("a", 4, group="w"), a_model("b", 4, group="w"))))
    assert not story.ever(DrainRoute)
