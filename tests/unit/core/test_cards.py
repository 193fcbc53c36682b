"""Since when a model is listed, and how many tokens it takes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway_plugin.catalog import Model
from serve.core import events as ev
from serve.core.policy import NodeTypeSpec
from serve.core.step import initial
from serve.core.views.cards import Card, Cards, after, asked_length, cards_from_json, cards_to_json, on_card, raised
from tests.support.fleets import a_kind, a_model, a_policy, begin

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
        ev.EngineReady("nobody", "h:1", 2.0, 9),
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


def measured(used_mib: int, **fields: Any) -> Cards:
    """The card of model ``a``, whose engine was seen to hold so much."""
    story = begin(a_model("a", **fields))
    story.ask("a")
    ready = ev.EngineReady(story.engine("a").id, "h:1", 42.04, 4096, used_mib=used_mib, kv_tokens=9000)
    return after(listed(a_model("a", **fields)), story.fleet, ready, 200.0)


def test_what_an_engine_holds_is_kept_and_shown_to_administrators() -> None:
    cards = measured(2500)
    assert on_card(cards["a"], detail=True) == {
        "created": 100, "max_model_len": 4096, "measured_gib": 2.44, "cache_tokens": 9000, "load_s": 42.0,
    }  # fmt: skip
    assert cards_from_json(json.loads(json.dumps(cards_to_json(cards)))) == cards
    earlier = {"a": {"created": 1, "source": "s", "args": [], "max_model_len": None}}
    assert cards_from_json(earlier)["a"] == Card(1, "s", ()), "written by an earlier version"
    story = begin(a_model("a"))
    story.ask("a")
    encoder = ev.EngineReady(story.engine("a").id, "h:1", 42.04, 4096, kv_tokens=128)
    assert after(cards, story.fleet, encoder, 300.0)["a"].kv_tokens == 0
    other = a_model("a").model_copy(update={"gpus": 1})
    assert listed(other, cards=cards)["a"].used_mib == 0, "of other GPUs nothing is known"


@pytest.mark.parametrize(
    ("used_mib", "predicted", "kinds", "gib"),
    [
        (4000, 4.0, (a_kind(host_gib=6),), 4.0),  # 3.9 GiB: enough
        (4500, 4.0, (a_kind(host_gib=6),), 4.7),  # 4.39 and a twentieth, to the next tenth
        (4500, None, (a_kind(host_gib=6),), 4.0),  # the user's own number stays
        (6500, 4.0, (a_kind(host_gib=6), a_kind(host_gib=3)), 6.0),  # no more than a node has
        (6500, 4.0, (), 4.0),
    ],
)
def test_a_number_that_was_worked_out_and_is_too_small_is_raised(
    used_mib: int, predicted: float | None, kinds: tuple[NodeTypeSpec, ...], gib: float
) -> None:
    model = a_model("a", predicted_gib=predicted)
    cards = measured(used_mib, predicted_gib=predicted)
    (found,) = raised((model,), cards, kinds)
    assert (found.memory_gib, found.predicted_gib) == (gib, predicted)
    assert raised((found,), cards, kinds) == (found,), "once"


def test_with_gpus_it_is_not_raised_since_vllm_fills_what_it_is_given() -> None:
    model = a_model("a", predicted_gib=4, gpus=1)
    cards = {"a": Card(1, model.source, (), gpus=1, used_mib=4500)}
    assert raised((model,), cards, (a_kind(gpus=(40,)),)) == (model,)


def test_an_engine_that_grows_is_the_new_most() -> None:
    story = begin(a_model("a"))
    story.ask("a")
    engine = story.engine("a").id
    before = story.fleet
    assert story.on(ev.EngineGrew(engine, 3000)) == ()
    assert story.fleet == before
    cards = after(listed(a_model("a")), story.fleet, ev.EngineGrew(engine, 3000), 200.0)
    assert cards["a"].used_mib == 3000
    assert after(cards, story.fleet, ev.EngineGrew(engine, 2500), 300.0) is cards
    assert after(cards, story.fleet, ev.EngineGrew("nobody", 9000), 300.0) is cards


def test_an_engine_stays_when_its_worked_out_memory_is_raised() -> None:
    story = begin(a_model("a", predicted_gib=4))
    story.ask("a")
    engine = story.engine("a")
    story.on(ev.CatalogChanged((a_model("a", memory_gib=4.7, predicted_gib=4),)))
    assert story.engine("a") == engine
    story.on(ev.CatalogChanged((a_model("a", memory_gib=5),)))
    assert story.engine("a").state is not engine.state, "another number of the user's"
