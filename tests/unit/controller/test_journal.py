"""What a controller leaves for the next one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from gateway_plugin import files
from gateway_plugin.catalog import Model
from gateway_plugin.files import Copies
from serve.controller import journal
from serve.controller.journal import Journal
from serve.core.events import CatalogChanged, Tick
from serve.core.policy import Policy
from serve.core.replay import replay
from serve.core.step import initial, step
from serve.core.views.cards import Card
from tests.support.fleets import a_model, begin

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


def test_a_log_replays_from_every_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_LOG_BYTES_MAX", 600)
    kept = Journal(tmp_path)
    story = begin(a_model("a", keep_alive="10m"), a_model("b"))
    story.ask("a")
    story.loaded("a")
    story.used("a")
    story.ask("b", after=5)
    story.drained("a")
    fleet, live, rotations = initial(story.fleet.policy), [], 0
    for event, at, _ in story.log:
        before = fleet
        fleet, effects = step(before, event, at)
        live.append(repr(effects))
        kept.record(event, at, before)
        path = tmp_path / "events.jsonl"
        with path.open() as lines:
            replayed = [repr(effects) for _, effects in replay(lines)]
        assert replayed == live[-len(replayed) :]
        rotations += len(replayed) == 1
    assert rotations > 2
    assert sum("StartEngine" in effects for effects in live) == 1
