"""A recorded event is the event; a replayed log gives the same decisions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_plugin.catalog import Model
from gateway_plugin.errors import ConfigError
from serve.core import events as ev
from serve.core.replay import VERSION, event_from_json, event_to_json, fleet_from_json, fleet_to_json, replay
from serve.core.state import Fleet
from serve.core.step import initial
from tests.support.fleets import a_model, begin

st.register_type_strategy(Mapping, st.dictionaries(st.text(), st.integers()))
st.register_type_strategy(float, st.floats(allow_nan=False))
floats = st.floats(allow_nan=False)
names = st.from_regex(r"[A-Za-z][A-Za-z0-9._/:@-]{0,20}", fullmatch=True)
models = st.builds(
    Model,
    name=names,
    source=st.text(min_size=1).filter(lambda source: "@" not in source),  # behind it a revision is wanted
    args=st.lists(st.text()).map(tuple),
    env=st.dictionaries(st.text(), st.text()),
    gpus=st.integers(0, 8),
    memory_gib=st.floats(0.001, 1000),
    keep_alive=st.one_of(st.just(-1), st.floats(0, 1e6)),
)
found_engines = st.builds(ev.FoundEngine, gpus=st.lists(st.integers(0, 7)).map(tuple), started=floats)
catalogs = st.builds(ev.CatalogChanged, st.lists(models).map(tuple))
every_event = st.one_of(
    catalogs,
    st.builds(ev.NodeJoined, engines=st.lists(found_engines, max_size=3).map(tuple)),
    *(
        st.from_type(kind)
        for kind in ev.Event.__args__
        if kind not in (ev.CatalogChanged, ev.NodeJoined)
    ),
)  # fmt: skip


@given(every_event)
@settings(max_examples=150)
def test_an_event_comes_back_from_json(event: ev.Event) -> None:
    line = json.dumps(event_to_json(event))
    back = event_from_json(json.loads(line))
    assert back == event
    assert type(back) is type(event)


def test_a_log_can_be_replayed() -> None:
    story = begin(a_model("a", keep_alive="10m"), a_model("b"))
    story.ask("a")
    story.loaded("a")
    story.used("a")
    story.ask("b", after=5)
    story.drained("a")
    lines = [json.dumps({"at": at, **event_to_json(event)}) for event, at, _ in story.log]
    replayed = list(replay([head(initial(story.fleet.policy)), *lines]))
    assert [repr((one.event, one.effects)) for one in replayed] == [repr((e, effects)) for e, _, effects in story.log]


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"event": "Nonsense"},
        {"event": ["RouteOpened"]},
        {"event": "RouteOpened"},
        {"event": "RouteOpened", "engine": 7},
        {"event": "RouteOpened", "engine": "e", "more": 1},
    ],
)
def test_what_is_no_event_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="recorded event"):
        event_from_json(document)


def test_a_broken_line_is_named() -> None:
    with pytest.raises(ConfigError, match="line 2"):
        list(replay(["", "{"]))


def test_a_log_that_is_not_whole_is_said_to_be_so() -> None:
    story = begin(a_model("a"))
    story.ask("a")
    start = head(initial(story.fleet.policy))
    lines = [json.dumps({"at": at, **event_to_json(event)}) + "\n" for event, at, _ in story.log]
    with pytest.raises(ConfigError, match=r"line 1.*beginning is missing"):
        list(replay(lines))
    with pytest.raises(ConfigError, match="empty"):
        list(replay([]))
    replayed = replay([start + "\n", lines[0], lines[1][:-9]])
    next(replayed)
    with pytest.raises(ConfigError, match=r"line 3.*cut off"):
        next(replayed)


def test_a_line_that_is_nested_too_deep_is_no_event() -> None:
    with pytest.raises(ConfigError, match="line 1: expected a JSON object"):
        list(replay(["[" * 100_000 + "\n"]))


def test_a_fleet_comes_back_from_json() -> None:
    story = begin(a_model("a", keep_alive="10m"), a_model("b"))
    story.ask("a")
    story.loaded("a")
    story.ask("b", after=5)
    engine = story.engine("a")
    story.on(ev.EngineStalled(engine.id, 2.0, 3))
    ill = story.fleet
    story.exited("a")
    story.on(ev.SuspectsKept("a"))
    story.on(ev.LoadAsked("b"))
    assert story.fleet.requested_until["b"] == math.inf
    assert any(one.stalled_since for one in ill.engines.values())
    assert story.fleet.apart
    assert story.fleet.waiters
    for fleet in (initial(story.fleet.policy), ill, story.fleet):
        assert fleet_from_json(json.loads(json.dumps(fleet_to_json(fleet)))) == fleet
    with pytest.raises(ConfigError, match="recorded fleet"):
        fleet_from_json({"version": VERSION, "fleet": {"policy": {"node_types": [7]}}})


def test_a_fleet_that_another_version_recorded_is_refused_in_plain_words() -> None:
    earlier = json.dumps({"at": 0.0, "fleet": {"policy": {"kinds": []}, "wished": {}}})
    with pytest.raises(ConfigError, match="another version of the gateway wrote it"):
        list(replay([earlier]))


def head(fleet: Fleet) -> str:
    """The first line of a log."""
    return json.dumps({"at": 0.0, **fleet_to_json(fleet)})
