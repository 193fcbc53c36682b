"""How long a load is expected to take, by earlier ones on the site."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway_plugin.cli.main import cli
from gateway_plugin.paths import Layout
from gateway_plugin.sizing.estimate import Estimate
from gateway_plugin.sizing.past import Expected, Load, expected, loads_in
from serve.core.views.cards import Card, cards_to_json
from tests.unit.sizing.published import PUBLISHED
from tests.unit.sizing.test_source import a_site

GIB = 2**30
LOADS = (
    Load("eight", "org/eight@main", 1, 20_000, 40.0),
    Load("seven", "org/seven", 1, 18_000, 30.0),
    Load("nine", "org/nine", 1, 24_000, 90.0),
    Load("large", "org/large", 4, 160_000, 300.0),
    Load("small", "org/small", 0, 2_500, 55.0),
    Load("odd", "org/odd", 1, 0, 5.0),
)


def engine(gib: float, gpus: int = 1) -> Estimate:
    return Estimate(gpus, int(gib * GIB), 0, 0, 1, 1)


@pytest.mark.parametrize(
    ("source", "wanted", "found"),
    [
        ("org/eight", engine(60), Expected(40.0, ("eight",), same=True)),
        ("org/eight", engine(60, 0), None),  # without a GPU that says nothing
        ("org/new", engine(20), Expected(40.0, ("eight", "nine", "seven"), same=False)),
        ("org/new", engine(40, 4), Expected(300.0, ("large",), same=False)),
        ("org/new", engine(400), None),
        ("org/new", engine(2, 0), Expected(55.0, ("small",), same=False)),
    ],
)
def test_as_the_same_model_did_or_those_of_its_size(source: str, wanted: Estimate, found: Expected | None) -> None:
    assert expected(source, wanted, LOADS) == found


def test_the_loads_are_those_of_the_controllers_cards() -> None:
    cards = {
        "a": Card(1, "org/a", (), gpus=2, load_s=42.0, used_mib=1000),
        "never": Card(1, "org/n", ()),
    }
    document = {**json.loads(json.dumps(cards_to_json(cards))), "bad": 3, "worse": {"load_s": "x", "source": "s"}}
    assert [asdict(load) for load in loads_in(document)] == [asdict(Load("a", "org/a", 2, 2000, 42.0))]


def test_the_plan_says_it(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "state")
    layout.controller.mkdir(parents=True, mode=0o700)
    cards = {"mine": Card(1, str(tmp_path), (), gpus=1, load_s=42.0, used_mib=9000)}
    layout.controller_files.cards.write_text(json.dumps(cards_to_json(cards)))
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Llama-3.2-1B"][1]))
    words = ["--state", str(layout.state), "models", "plan", str(tmp_path), "--site", str(a_site(tmp_path))]
    runner = CliRunner(env={"GATEWAY_URL": ""})
    assert "loads in about 42 s, as mine did" in runner.invoke(cli, words, catch_exceptions=False).output
    found = json.loads(runner.invoke(cli, [*words, "--json"], catch_exceptions=False).output)["fits"]
    assert [(fit["load_s"], fit["load_like"], fit["cache_tokens"]) for fit in found if fit["fits"]] == [
        (42.0, ["mine"], 4 * 16_384)
    ]
    layout.controller_files.cards.write_text("no JSON")
    assert "loads in" not in runner.invoke(cli, words, catch_exceptions=False).output
