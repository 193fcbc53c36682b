"""``gateway models why``: what is told of a model in each of its states."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.core import events as ev
from serve.core.events import Priority, Requester
from serve.core.forecast import model_state
from serve.core.state import Action
from serve.core.views.status import outlook_view
from serve.core.views.why import DECISIONS_SHOWN, why_view
from tests.support.fleets import Story, a_model, begin
from tests.unit.core.test_properties import MODELS, POLICY
from tests.unit.core.world import World


def told(story: Story, model: str) -> tuple[str, str]:
    """Why, and what would change it, each as one text."""
    found = why_view(story.fleet, model, story.now)
    return " ".join(found["why"]), " ".join(found["would_change"])


def test_a_cold_model_says_what_loads_it() -> None:
    why, change = told(begin(a_model("a")), "a")
    assert why == "It is not loaded, and nothing asks for it."
    assert "gateway models load a" in change


def test_a_load_says_for_how_long_and_for_whom() -> None:
    story = begin(a_model("a", load_timeout=60))
    story.ask("a", requester=Requester("k1"))
    story.ask("a", requester=Requester("k2", priority=Priority.BATCH), after=5)
    story.tick(5)
    why, change = told(story, "a")
    assert "has been loading for 10 s" in why
    assert "2 requests of 2 requesters wait for it, 1 of them batch, the oldest for 10 s." in why
    assert "fails if it is not ready in 50 s (load_timeout)" in change


def test_what_serves_says_what_keeps_it() -> None:
    story = begin(a_model("a", keep_alive="10m"), a_model("b"))
    story.ask("a")
    story.loaded("a")
    story.seen("a", in_flight=2, after=60)
    why, change = told(story, "a")
    assert "2 requests in flight" in why
    assert "keeps its place: 2 requests in flight; waiters of another model that weigh more make it go" in change
    story.seen("a", after=30)
    story.tick(60)
    why, change = told(story, "a")
    assert "last used 90 s ago" in why or "last used 60 s ago" in why
    assert "is evicted when another model needs its room" in change
    assert "unloaded in" in change
    story.on(ev.PinChanged("a", pinned=True))
    why, change = told(story, "a")
    assert "It is pinned" in why
    assert "keeps its place: pinned" in change


def test_a_model_that_waits_names_what_holds_its_room_and_those_before_it() -> None:
    story = begin(a_model("a", 4), a_model("b", 4), a_model("c", 5))
    story.ask("a")
    story.loaded("a")
    story.seen("a", in_flight=3)
    story.ask("b", after=1)
    story.ask("c", after=1)
    assert model_state(story.fleet, "c") == "queued"
    why, change = told(story, "c")
    assert "1 model that waits for room came earlier" in why
    assert "Node cpu-0-0 could hold it (5120 MiB of host memory) but for a (3 requests in flight)" in change
    assert outlook_view(story.fleet, "c", story.now)["models_before"] == 1
    assert outlook_view(story.fleet, "b", story.now)["models_before"] == 0
    assert outlook_view(story.fleet, "a", story.now)["models_before"] is None
    weighed = why_view(story.fleet, "c", story.now, lambda fleet, model, now: (f"{model} weighs 7 s.",))
    assert "c weighs 7 s." in weighed["why"]


def test_an_eviction_is_told_of_both_models() -> None:
    story = begin(a_model("a", 4), a_model("b", 4))
    story.ask("a")
    story.loaded("a")
    story.used("a")
    story.ask("b", after=10)
    why, change = told(story, "a")
    assert "draining" in why
    assert "0 s ago it was evicted" in why
    assert "A request for it now keeps" in change
    story.drained("a")
    story.exited("a", expected=True)
    assert "it was evicted" in told(story, "a")[0], "still known when it is cold"
    actions = [one["action"] for one in why_view(story.fleet, "a", story.now)["decisions"]]
    assert "evict" in actions


def test_a_drain_that_is_cancelled_is_told() -> None:
    story = begin(a_model("a", 4), a_model("b", 4))
    story.ask("a")
    story.loaded("a")
    story.used("a")
    ticket = story.ask("b", after=10)
    story.on(ev.WaiterLeft(ticket))
    story.ask("a")
    story.on(ev.RouteDrained(story.engine("a").id))
    assert [one.action for one in story.fleet.decisions if one.model == "a"][-2:] == [Action.EVICT, Action.KEEP]


def test_a_failure_is_told_with_its_back_off() -> None:
    story = begin(a_model("a"))
    story.ask("a")
    story.exited("a", "exit code 1: out of memory")
    why, change = told(story, "a")
    assert "Its engine failed 1 time in a row, the last time: exit code 1: out of memory" in why
    assert "'gateway models load a' tries again at once" in change
    waits = [one for one in story.fleet.decisions if one.action is Action.WAIT]
    assert "no load is tried for 2 s" in waits[-1].because
    assert "out of memory" not in waits[-1].because, "an engine's own output is in no decision"


@pytest.mark.parametrize(
    ("event", "because"),
    [
        (ev.UnloadAsked("a"), "an administrator unloaded it"),
        (ev.CatalogChanged((a_model("b"),)), "the catalog has no such entry"),
        (ev.NodeDrainAsked("cpu-0-0"), "its node is given back"),
    ],
    ids=["unload", "catalog", "drain"],
)
def test_a_stop_says_why(event: ev.Event, because: str) -> None:
    story = begin(a_model("a"), a_model("b"))
    story.ask("a")
    story.loaded("a")
    story.on(event)
    assert [one.action for one in story.fleet.decisions] == [Action.LOAD, Action.STOP]
    assert because in story.fleet.decisions[1].because
    assert story.fleet.decisions[1].at == story.now


def test_an_idle_engine_says_for_how_long_it_was_idle() -> None:
    story = begin(a_model("a", keep_alive=20))
    story.ask("a")
    story.loaded("a")
    story.used("a")
    story.tick(30)
    assert story.fleet.decisions[-1].because == "nothing was sent to it for 30 s, and keep_alive is 20 s"


@given(st.integers(0, 2**16))
@settings(max_examples=15)
def test_every_model_of_a_random_fleet_can_be_explained(seed: int) -> None:
    world = World(POLICY, MODELS, seed)
    for _ in range(60):
        if world.random.random() < 0.3:
            world.request(world.random.choice(MODELS).name)
        world.one_thing()
        world.now += 0.5
        for model in world.fleet.models:
            found = why_view(world.fleet, model, world.now)
            assert found["why"]
            assert found["would_change"]
            assert len(found["decisions"]) <= DECISIONS_SHOWN
            assert all(sentence.endswith(".") and ".." not in sentence for sentence in found["why"])
