"""What is learned of models survives the controller."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from gateway_plugin.clock import SteadyClock
from serve.controller.journal import Journal
from serve.controller.learned import given_back, kept
from serve.controller.memory import Memory
from serve.core import events as ev
from serve.core.effects import DrainRoute
from serve.core.learned import Learned, learned
from serve.core.replay import replay
from serve.core.state import Fleet
from serve.core.step import initial, step
from tests.support.fleets import Story, a_model, a_policy, begin


def taught() -> Story:
    """``often`` and ``once`` were used as their names say; a requester asks them in turn."""
    story = begin(a_model("often", 3), a_model("once", 3), a_model("new", 3))
    for model in ("often", "once"):
        story.ask(model, requester=ev.Requester("k"))
        story.loaded(model)
    for _ in range(12):
        story.tick(20)
        story.used("often")
    return story


def clock_at(*wall: float) -> SteadyClock:
    """The wall clock reads ``wall``, one after the other; the steady one stands still."""
    times = list(wall)
    return SteadyClock(lambda: times.pop(0) if len(times) > 1 else times[0], lambda: 0.0)


def memory(folder: Path, fleet: Fleet, now: float) -> Memory:
    return Memory(Journal(folder), clock_at(now), lambda: fleet)


def test_the_next_controller_begins_with_it(tmp_path: Path) -> None:
    story = taught()
    asyncio.run(memory(tmp_path, story.fleet, story.now).write())
    found = memory(tmp_path, initial(a_policy()), story.now).read()
    assert found.load_s == story.fleet.load_s
    assert found.follows == story.fleet.follows
    assert found.habits.keys() == story.fleet.habits.keys()
    for name, habit in found.habits.items():
        before = story.fleet.habits[name]
        assert habit.pauses == pytest.approx(before.pauses, abs=1e-3)
        assert replace(habit, pauses=before.pauses) == before
    assert learned(initial(a_policy(), found)) == found


def test_times_are_those_of_the_wall_clock(tmp_path: Path) -> None:
    story = taught()
    written = kept(learned(story.fleet), lambda at: at + 100.0)
    read = given_back(written, lambda at: at - 100.0)
    assert read.habits["often"].last == story.fleet.habits["often"].last


def test_a_use_after_now_was_now_where_the_clock_was_set_back(tmp_path: Path) -> None:
    story = taught()
    asyncio.run(memory(tmp_path, story.fleet, story.now).write())
    found = memory(tmp_path, initial(a_policy()), story.now - 86_400).read()
    assert {habit.last for habit in found.habits.values()} == {story.now - 86_400}


def test_a_restarted_controller_evicts_what_is_rarely_asked_at_its_first_decision(tmp_path: Path) -> None:
    """Without what was learned, ``often`` and ``once`` would be worth the same."""
    before = taught()
    before.tick(10)
    story = Story(initial(a_policy(), learned(before.fleet)), now=before.now)
    story.on(ev.CatalogChanged(tuple(before.fleet.models.values())))
    story.on(ev.Started(2, {"often": 0, "once": 1}, (), ("cpu-0-0",)))
    at = {name: before.engine(name) for name in ("often", "once")}
    engines = tuple(
        ev.FoundEngine(one.id, name, (), one.parts[0].mib, one.started, one.address, ready=True)
        for name, one in at.items()
    )
    story.join(engines=engines)
    for name in at:
        story.opened(name)
        story.seen(name)
    story.tick(5)
    story.ask("new")
    for _ in range(30):
        story.tick(1)
    assert [drain.engine for drain in story.ever(DrainRoute)] == [at["once"].id]


@pytest.mark.parametrize(
    "garbled",
    ["", "{", "[]", "\x00", '{"a":' * 100_000, '{"habits": []}', '{"load_s": {"a": NaN}}', '{"load_s": {"a": -1}}',
     '{"habits": {"a": {"last": 1, "fast": 0, "slow": 0, "pauses": [1]}}}'],
)  # fmt: skip
def test_a_garbled_file_is_set_aside_and_logged(tmp_path: Path, garbled: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "learned.json").write_text(garbled)
    with caplog.at_level("ERROR", "gateway.controller"):
        found = memory(tmp_path, initial(a_policy()), 1000.0).read()
    assert found == Learned()
    assert [record.message for record in caplog.records] == ["state-garbled"]
    assert (tmp_path / "learned.json.garbled").read_text() == garbled


def test_a_file_of_a_later_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "learned.json").write_text('{"load_s": {"a": 7.5}, "later": 1}')
    assert memory(tmp_path, initial(a_policy()), 0.0).read() == Learned(load_s={"a": 7.5})


def test_models_that_the_catalog_has_no_more_are_forgotten() -> None:
    fleet = initial(a_policy(), Learned(load_s={"a": 7.5, "gone": 8.0}))
    fleet, _ = step(fleet, ev.CatalogChanged((a_model("a"),)), 1000.0)
    assert fleet.load_s == {"a": 7.5}


def test_a_log_begins_with_it_so_that_a_replay_decides_the_same(tmp_path: Path) -> None:
    fleet = initial(a_policy(), learned(taught().fleet))
    log = Journal(tmp_path)
    log.record(ev.CatalogChanged((a_model("often"),)), 2000.0, fleet)
    lines = (tmp_path / "events.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines[0])["fleet"]["load_s"] == {"often": 10.0, "once": 10.0}
    (only,) = replay(lines)
    assert only.fleet.habits["often"] == fleet.habits["often"]
