"""Since when a model is listed, and how many tokens it takes."""

from __future__ import annotations

import json

import pytest

from gateway_plugin.catalog import Model
from serve.core import events as ev
from serve.core.step import initial
from serve.core.views.cards import Card, Cards, after, asked_length, cards_from_json, cards_to_json, on_card
from tests.support.fleets import a_model, a_policy, begin

EMPTY = initial(a_policy())


def listed(*models: Model, cards: Cards | None = None, at: float = 100.7) -> Cards:
    return after(cards or {}, EMPTY, ev.CatalogChanged(models), at)


def test_a_model_is_created_when_it_is_first_listed_and_stays_so() -> None:
    first = listed(a_model("a"))
    later = listed(a_model("a"), a_model("b"), cards=first, at=200.0)
    assert (later["a"].created, later["b"].created) == (100, 200)
    assert after(later, EMPTY, ev.Tick(), 300.0) is later
    assert set(listed(a_model("b"), cards=later, at=300.0)) == {"b"}
    assert cards_from_json(json.loads(json.dumps(cards_to_json(later)))) == later


def test_what_an_engine_says_counts_until_the_model_is_another() -> None:
    story = begin(a_model("a"))
    story.ask("a")
    engine = story.engine("a")
    cards = listed(a_model("a"))
    ready = ev.EngineReady(engine.id, "h:1", 1.0, 4096)
    told = after(cards, story.fleet, ready, 200.0)
    assert on_card(told["a"]) == {"created": 100, "max_model_len": 4096}
    for other in (
        ev.EngineReady("nobody", "h:1", 1.0, 9),
        ev.EngineReady(engine.id, "h:1", 1.0),
    ):
        assert after(told, story.fleet, other, 300.0) is told
    assert listed(a_model("a"), cards=told) == told
    changed = listed(a_model("a").model_copy(update={"args": ("--max-model-len", "99")}), cards=told, at=300.0)
    assert on_card(changed["a"]) == {"created": 100, "max_model_len": 99}


def test_a_model_without_a_card_has_nothing_to_tell() -> None:
    assert on_card(None) == {"created": 0, "max_model_len": None}
    assert on_card(Card(7, "s", ())) == {"created": 7, "max_model_len": None}


@pytest.mark.parametrize(
    ("args", "length"),
    [
        (("--max-model-len", "8192"), 8192),
        (("--max-model-len=8192",), 8192),
        (("--max_model_len", "32k"), 32_000),
        (("--max-model-len=32K",), 32_768),
        (("--max-model-len=1.5k",), 1500),
        (("--max-model-len=1", "--max-model-len=2"), 2),
        (("--max-model-len", "auto"), None),
        (("--max-model-len=-1",), None),
        (("--max-model-len=0",), None),
        (("--max-model-len",), None),
        (("--max-model-lengthy=3",), None),
        ((), None),
    ],
)
def test_the_length_that_the_arguments_ask_for(args: tuple[str, ...], length: int | None) -> None:
    assert asked_length(args) == length
