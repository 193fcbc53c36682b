"""A model whose engine died in service is kept apart: as long as there is something to find out, and no longer."""

from __future__ import annotations

from serve.core import events as ev
from serve.core.effects import OpenRoute, SyncSlots
from serve.core.policy import APART_S, DOUBT_S, REOPENS_S
from tests.support.fleets import Story, a_model, begin

BOTH = {"a", "b"}
"""A name and an alias lead to the same engines."""


def served(*, after_death: bool = False) -> Story:
    story = begin(a_model("a", aliases=("b",)))
    story.ask("a")
    story.loaded("a")
    if after_death:
        story.exited("a", "killed", after=60)
    return story


def at_the_edge(story: Story) -> set[str]:
    """The names that the edge was last told to keep apart."""
    return set(story.ever(SyncSlots)[-1].apart)


def test_an_engine_that_was_told_to_stop_is_no_reason() -> None:
    story = served()
    story.exited("a", "stopped", expected=True)
    assert not story.fleet.apart


def test_an_engine_that_died_with_nothing_in_flight_is_forgotten_at_once() -> None:
    story = served(after_death=True)
    assert at_the_edge(story) == BOTH, "what came in the last second is not counted yet"
    story.tick(DOUBT_S - 0.1)
    assert at_the_edge(story) == BOTH
    story.tick(0.1)
    assert at_the_edge(story) == set()
    story.ask("a")
    story.loaded("a")
    assert at_the_edge(story) == set()


def test_no_route_is_opened_while_the_edge_may_try_again_what_the_dead_engine_had() -> None:
    story = served(after_death=True)
    story.ask("a")
    story.got_ready("a", after=0.5)
    opened = len(story.ever(OpenRoute))
    story.tick(REOPENS_S - 0.6)
    assert len(story.ever(OpenRoute)) == opened
    story.tick(0.1)
    assert len(story.ever(OpenRoute)) == opened + 1


def test_while_somebody_waits_for_the_next_engine_the_time_does_not_run() -> None:
    story = served(after_death=True)
    story.ask("a", after=1)
    for _ in range(10):
        story.tick(30)
    assert at_the_edge(story) == BOTH
    story.loaded("a")
    told = [effect for _, _, effects in story.log for effect in effects if isinstance(effect, SyncSlots | OpenRoute)]
    assert isinstance(told[-1], OpenRoute), "the edge knew before the route was opened"
    assert at_the_edge(story) == BOTH
    story.tick(APART_S)
    assert at_the_edge(story) == set(), "and nobody was suspected"


def test_it_lasts_for_as_long_as_the_ingress_has_suspects() -> None:
    story = served(after_death=True)
    began = story.now
    for _ in range(60):
        story.on(ev.SuspectsKept("b"), after=5)
    assert at_the_edge(story) == BOTH
    assert story.fleet.apart["a"].since == began, "without a break"
    story.tick(APART_S - 0.1)
    assert at_the_edge(story) == BOTH
    story.tick(0.1)
    assert at_the_edge(story) == set()
    story.on(ev.SuspectsKept("a"))
    assert at_the_edge(story) == BOTH, "the controller may have been away"
    story.on(ev.SuspectsKept("nobody's"))
    assert set(story.fleet.apart) == {"a"}


def test_a_restarted_controller_keeps_it_for_a_while() -> None:
    story = served(after_death=True)
    story.on(ev.Started(2, {"a": 0}, (), (), apart=frozenset({"a"})), after=1)
    assert story.fleet.apart["a"].since == story.now, "what the edge did before is not known"
    story.tick()
    assert at_the_edge(story) == BOTH
    story.tick(APART_S)
    assert at_the_edge(story) == set()


def test_a_model_that_leaves_the_catalog_is_not_kept_apart() -> None:
    story = served(after_death=True)
    story.on(ev.CatalogChanged(()))
    assert not story.fleet.apart
