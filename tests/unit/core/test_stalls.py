"""Engines that have work and make no progress: what is shown of them, and that others can have their room."""

from __future__ import annotations

from serve.core import events as ev
from serve.core.effects import Answer, DrainRoute, StartEngine
from serve.core.state import EngineState
from serve.core.views.status import model_view, status_view
from tests.support.fleets import Story, a_model, begin

WORDS = "no progress for 40 s with 3 requests in flight; ended at 60 s"


def stalled_a() -> Story:
    """``a`` serves, has three requests in flight, and has stood still for 30 s; ``b`` would need its room."""
    story = begin(a_model("a", hang_after=60), a_model("b"))
    story.ask("a")
    story.loaded("a")
    story.seen("a", in_flight=3)
    engine = story.engine("a")
    story.on(ev.EngineStalled(engine.id, 30.0, 3), 10)
    return story


def test_state_and_reason_say_so_in_models_and_status() -> None:
    story = stalled_a()
    view = model_view(story.fleet, "a", story.now + 10)
    assert (view["state"], view["reason"]) == ("stalled", WORDS)
    (engine,) = status_view(story.fleet, story.now + 10)["engines"]
    assert (engine["state"], engine["reason"]) == ("stalled", WORDS)


def test_one_that_moves_again_is_ready() -> None:
    story = stalled_a()
    engine = story.engine("a")
    story.on(ev.EngineMoves("another"))
    assert model_view(story.fleet, "a", story.now)["state"] == "stalled"
    story.on(ev.EngineMoves(engine.id))
    view = model_view(story.fleet, "a", story.now)
    assert (view["state"], view["reason"]) == ("ready", None)


def test_its_end_is_a_death_like_any_other() -> None:
    story = stalled_a()
    ticket = story.ask("a", not_routed=True)
    story.exited("a", "hung: no progress for 60 s with 3 requests in flight")
    assert [start.model.name for start in story.ever(StartEngine)] == ["a", "a"], "at once, for who waits"
    story.loaded("a")
    assert story.answers()[ticket] == Answer(ticket)
    assert model_view(story.fleet, "a", story.now)["state"] == "ready"


def test_its_room_can_be_had_by_another_model() -> None:
    story = stalled_a()
    story.ask("b", after=10)
    assert [drain.engine for drain in story.said(DrainRoute)] == [story.engine("a").id]
    story.exited("a", "hung: no progress for 60 s with 3 requests in flight")
    assert story.engine("b").state is EngineState.LOADING


def test_one_that_is_busy_and_moves_is_no_victim() -> None:
    story = stalled_a()
    engine = story.engine("a")
    story.on(ev.EngineMoves(engine.id))
    story.ask("b", after=10)
    assert not story.said(DrainRoute)
