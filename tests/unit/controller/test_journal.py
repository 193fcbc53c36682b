"""What a controller leaves for the next one."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from gateway_plugin import files
from gateway_plugin.catalog import Model
from gateway_plugin.files import Copies
from serve.controller import journal
from serve.controller.journal import Journal
from serve.core.events import CatalogChanged, Event, Tick
from serve.core.policy import Policy
from serve.core.replay import digest, new_decisions, replay
from serve.core.state import Action
from serve.core.step import initial, step
from serve.core.views.cards import Card
from tests.support.fleets import a_model, begin
from tests.unit.core.test_properties import MODELS, POLICY
from tests.unit.core.world import World

FLEET = initial(Policy(slots=3))


def events_in(path: Path) -> list[float]:
    """When the events of a log were, its first line left out: the fleet that they met."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert "fleet" in lines[0]
    return [line["at"] for line in lines[1:]]


def no_room(_path: Path, _content: str) -> None:
    raise OSError(28, "No space left on device")


def test_every_life_has_a_higher_epoch(tmp_path: Path) -> None:
    assert [Journal(tmp_path).next_epoch(7.5) for _ in range(3)] == [7, 8, 9]
    assert Journal(tmp_path).next_epoch(1.0) == 10, "the clock was set back"


@pytest.mark.parametrize("garbled", ["", "x", "\x00\x01", "1 2"])
def test_an_epoch_rises_though_the_file_is_garbled(tmp_path: Path, garbled: str) -> None:
    Journal(tmp_path).next_epoch(100.0)
    (tmp_path / "epoch").write_text(garbled)
    assert Journal(tmp_path).next_epoch(101.0) == 101
    assert (tmp_path / "epoch.garbled").read_text() == garbled


def test_an_epoch_rises_though_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(tmp_path).next_epoch(100.0)
    with monkeypatch.context() as full:
        full.setattr(files, "write_private", no_room)
        assert [Journal(tmp_path).next_epoch(at) for at in (110.0, 120.0)] == [110, 120]
    assert Journal(tmp_path).next_epoch(130.0) == 130


@pytest.mark.parametrize("garbled", ["", "{", "[]", '{"pinned": "abc"}', '{"pinned": [1]}', "\x00"])
def test_garbled_pins_are_set_aside(tmp_path: Path, garbled: str) -> None:
    (tmp_path / "wishes.json").write_text(garbled)
    assert Journal(tmp_path).pins() == (frozenset(), frozenset())
    assert (tmp_path / "wishes.json.garbled").read_text() == garbled
    Journal(tmp_path).keep_pins(frozenset({"a"}), frozenset())
    assert Journal(tmp_path).pins() == (frozenset({"a"}), frozenset())


def test_pins_of_another_version_are_read(tmp_path: Path) -> None:
    (tmp_path / "wishes.json").write_text('{"pinned": ["a"], "later": 1}')
    assert Journal(tmp_path).pins() == (frozenset({"a"}), frozenset())


def test_pins_on_a_full_disk_are_written_when_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Copies()
    kept = Journal(tmp_path, copies)
    with monkeypatch.context() as full:
        full.setattr(files, "write_private", no_room)
        kept.keep_pins(frozenset({"a"}), frozenset())
        kept.keep_pins(frozenset({"b"}), frozenset())
        copies.retry()
        assert "No space left on device" in copies.trouble
        assert str(tmp_path) not in copies.trouble
        assert copies.unwritten == (str(tmp_path / "wishes.json"),)
    copies.retry()
    assert [copies.trouble, *copies.unwritten] == [""]
    assert Journal(tmp_path).pins() == (frozenset({"b"}), frozenset())


def test_pins_are_kept(tmp_path: Path) -> None:
    assert Journal(tmp_path).pins() == (frozenset(), frozenset())
    Journal(tmp_path).keep_pins(frozenset({"a"}), frozenset({"b"}))
    assert Journal(tmp_path).pins() == (frozenset({"a"}), frozenset({"b"}))


def test_cards_are_kept_and_garbled_ones_forgotten(tmp_path: Path) -> None:
    cards = {"a": Card(7, "org/a", ("--x",), 4096)}
    assert Journal(tmp_path).cards() == {}
    Journal(tmp_path).keep_cards(cards)
    assert Journal(tmp_path).cards() == cards
    for garbled in ("", "[]", '{"a": 1}', '{"a": {"created": "x"}}'):
        (tmp_path / "cards.json").write_text(garbled)
        assert Journal(tmp_path).cards() == {}
        assert not (tmp_path / "cards.json").exists()
    Journal(tmp_path / "gone").keep_cards(cards)


def test_events_are_recorded_one_a_line_and_a_new_life_keeps_the_old_log(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.record(Tick(), 1.5, FLEET)
    first.record(Tick(), 2.5, FLEET)
    Journal(tmp_path).record(Tick(), 9.0, FLEET)
    assert events_in(tmp_path / "events.1.jsonl") == [1.5, 2.5]
    new = tmp_path / "events.jsonl"
    assert events_in(new) == [9.0]
    assert new.stat().st_mode & 0o777 == 0o600


def test_the_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_LOG_BYTES_MAX", 200)
    kept = Journal(tmp_path)
    for second in range(100):
        kept.record(Tick(), float(second), FLEET)
    events = [events_in(path) for path in sorted(tmp_path.glob("events*"))]
    assert len(events) == 2
    assert all(len(found) < 10 for found in events)


def test_secrets_of_the_catalog_stay_out_of_the_log(tmp_path: Path) -> None:
    model = Model(name="m", source="x", memory_gib=1, env={"HF_TOKEN": "hf_secret"})
    Journal(tmp_path).record(CatalogChanged((model,)), 1.0, replace(FLEET, models={"m": model}))
    text = (tmp_path / "events.jsonl").read_text()
    assert "HF_TOKEN" in text
    assert "hf_secret" not in text


def test_a_folder_that_cannot_be_written_stops_nothing_and_the_log_goes_on_later(tmp_path: Path) -> None:
    copies = Copies()
    kept = Journal(tmp_path / "gone", copies)
    kept.record(Tick(), 1.0, FLEET)
    assert kept.next_epoch(7.0) == 7
    kept.keep_pins(frozenset(), frozenset())
    assert copies.trouble
    (tmp_path / "gone").mkdir()
    kept.record(Tick(), 2.0, FLEET)
    assert not (tmp_path / "gone" / "events.jsonl").exists(), "not tried again at once"
    kept.record(Tick(), 7.0, FLEET)
    copies.retry()
    assert events_in(tmp_path / "gone" / "events.jsonl") == [7.0]
    assert copies.trouble == ""


def test_on_an_idle_gateway_the_trouble_goes_with_its_cause(tmp_path: Path) -> None:
    copies = Copies()
    kept = Journal(tmp_path / "gone", copies)
    kept.record(Tick(), 0.5, FLEET, news=False)
    assert copies.trouble == "", "what is no news is not written"
    kept.record(Tick(), 1.0, FLEET)
    (tmp_path / "gone").mkdir()
    kept.record(Tick(), 2.0, FLEET, news=False)
    assert copies.trouble
    for at in (7.0, 8.0):
        kept.record(Tick(), at, FLEET, news=False)
        assert copies.trouble == ""
    assert events_in(tmp_path / "gone" / "events.jsonl") == [7.0]


def test_a_nearly_full_disk_does_not_wipe_the_log_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for the line with the fleet, and none for an event."""
    Journal(tmp_path).record(Tick(), 1.0, FLEET)
    append = Journal._append

    def little_room(opened: IO[str], document: dict[str, object]) -> int:
        written = append(opened, document)
        if "fleet" not in document:
            opened.close()
            raise OSError(28, "No space left on device")
        return written

    kept = Journal(tmp_path)
    with monkeypatch.context() as nearly_full:
        nearly_full.setattr(Journal, "_append", staticmethod(little_room))
        for at in (2.0, 12.0, 22.0):
            kept.record(Tick(), at, FLEET)
    assert events_in(tmp_path / "events.1.jsonl") == [1.0]
    kept.record(Tick(), 32.0, FLEET)
    assert events_in(tmp_path / "events.1.jsonl") == [1.0]
    assert events_in(tmp_path / "events.jsonl") == [32.0]


def random_run(seed: int, things: int) -> list[tuple[Event, float]]:
    """The events of a world in which requests come, time passes, counters arrive and engines crash, in one life."""
    world, chance = World(POLICY, MODELS, seed), random.Random(seed)
    for _ in range(things):
        match chance.randrange(12):
            case 0 | 1 | 2:
                world.request(chance.choice(MODELS).name)
            case 3:
                world.now += chance.choice((0.3, 3.0, 10.0))
                world.tell(Tick())
            case 4 if world.requests:
                world.end_request(chance.randrange(len(world.requests)))
            case 5:
                world.count()
            case 6 if world.processes() and chance.random() < 0.3:
                engine = chance.choice(sorted(world.processes()))
                agent = next(agent for agent in world.agents.values() if engine in agent.processes)
                world.crash(agent, world.processes()[engine])
            case _:
                world.one_thing()
                world.now += 0.01
    return [(event, at) for event, at, _ in world.log]


@pytest.mark.parametrize("seed", range(3))
def test_a_random_run_replays_to_the_same_effects_and_decisions_over_every_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(journal, "_LOG_BYTES_MAX", 4_000)
    kept, fleet = Journal(tmp_path), initial(POLICY)
    live: list[str] = []
    decided: set[Action] = set()
    files: list[str] = []
    """What was written, all rotations in a row."""
    for event, at in random_run(seed, 600):
        before = fleet
        fleet, effects = step(before, event, at)
        decisions = new_decisions(before, fleet)
        decided |= {one.action for one in decisions}
        live.append(repr((event, effects, decisions)))
        old = (tmp_path / "events.jsonl").stat() if files else None
        kept.record(event, at, before, digest(effects, decisions))
        if old is None or (tmp_path / "events.jsonl").stat().st_ino != old.st_ino:
            files.append("")
        files[-1] = (tmp_path / "events.jsonl").read_text()
    assert len(files) > 4, "it was rotated"
    assert len(decided) > 1
    again = list(replay(line for text in files for line in text.splitlines(keepends=True)))
    assert [repr((one.event, one.effects, one.decisions)) for one in again] == live
    assert all(one.as_recorded for one in again)
    assert again[-1].fleet == fleet
    last = list(replay(files[-1].splitlines(keepends=True)))
    assert [repr((one.event, one.effects, one.decisions)) for one in last] == live[-len(last) :]


def test_a_replay_says_at_which_event_it_differs(tmp_path: Path) -> None:
    kept, fleet = Journal(tmp_path), initial(POLICY)
    for event, at in random_run(7, 200):
        before = fleet
        fleet, effects = step(before, event, at)
        kept.record(event, at, before, digest(effects, new_decisions(before, fleet)))
    lines = (tmp_path / "events.jsonl").read_text().splitlines(keepends=True)
    done = [index for index, line in enumerate(lines) if '"did"' in line]
    assert all(one.as_recorded for one in replay(lines))
    wrong = done[len(done) // 2]
    lines[wrong] = re.sub('"did":"[0-9a-f]{12}"', '"did":"000000000000"', lines[wrong])
    found = [index for index, one in enumerate(replay(lines), 1) if not one.as_recorded]
    assert found == [wrong]
    without = [re.sub(',"did":"[0-9a-f]{12}"', "", line) for line in lines]
    assert not all(one.as_recorded for one in replay(without)), "a missing effect is a difference too"


def test_a_changed_environment_is_a_change_in_the_log_too(tmp_path: Path) -> None:
    """Its values are hidden there, and yet one that changes makes engines load again."""
    story = begin(a_model("a", env={"TOKEN": "hf_one"}))
    story.ask("a")
    story.loaded("a")
    for token in ("hf_one", "hf_two"):
        story.on(CatalogChanged((a_model("a", env={"TOKEN": token}),)))
    assert story.fleet.decisions
    kept, fleet = Journal(tmp_path), initial(story.fleet.policy)
    for event, at, _ in story.log:
        before = fleet
        fleet, effects = step(before, event, at)
        kept.record(event, at, before, digest(effects, new_decisions(before, fleet)))
    lines = (tmp_path / "events.jsonl").read_text().splitlines(keepends=True)
    assert all(one.as_recorded for one in replay(lines))
    assert "hf_" not in "".join(lines)
    assert list(replay(lines))[-1].decisions == story.fleet.decisions[-1:]
