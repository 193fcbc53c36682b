"""What a controller leaves for the next one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway_plugin.catalog import Model
from serve.controller import journal
from serve.controller.journal import Journal
from serve.core.cards import Card
from serve.core.events import CatalogChanged, Tick


def test_every_life_has_a_higher_epoch(tmp_path: Path) -> None:
    assert [Journal(tmp_path).next_epoch() for _ in range(3)] == [1, 2, 3]


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
    (tmp_path / "cards.json").unlink()
    Journal(tmp_path / "gone").keep_cards(cards)


def test_events_are_recorded_one_a_line_and_a_new_life_keeps_the_old_log(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.record(Tick(), 1.5)
    first.record(Tick(), 2.5)
    Journal(tmp_path).record(Tick(), 9.0)
    old = (tmp_path / "events.1.jsonl").read_text().splitlines()
    assert [json.loads(line)["at"] for line in old] == [1.5, 2.5]
    new = tmp_path / "events.jsonl"
    assert json.loads(new.read_text())["at"] == 9.0
    assert new.stat().st_mode & 0o777 == 0o600


def test_the_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_LOG_BYTES_MAX", 200)
    kept = Journal(tmp_path)
    for second in range(100):
        kept.record(Tick(), float(second))
    assert sum(path.stat().st_size for path in tmp_path.glob("events*")) < 600


def test_secrets_of_the_catalog_stay_out_of_the_log(tmp_path: Path) -> None:
    model = Model(name="m", source="x", memory_gib=1, env={"HF_TOKEN": "hf_secret"})
    Journal(tmp_path).record(CatalogChanged((model,)), 1.0)
    text = (tmp_path / "events.jsonl").read_text()
    assert "HF_TOKEN" in text
    assert "hf_secret" not in text


def test_a_folder_that_cannot_be_written_costs_the_log_and_nothing_else(tmp_path: Path) -> None:
    gone = Journal(tmp_path / "gone")
    gone.record(Tick(), 1.0)
    gone.record(Tick(), 2.0)
    assert gone.next_epoch() == 1
