"""Every recipe is a valid entry, is planned for the node types of the sites, and stands in docs/models.md as it is."""

from __future__ import annotations

import json
import re
from importlib import util
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway_plugin.catalog import Model, load_catalog, parse_catalog
from gateway_plugin.cli.main import cli
from gateway_plugin.recipes.recipes import find_recipe, recipes
from gateway_plugin.sizing.auto import Unsized, sized
from gateway_plugin.sizing.plan import GIB, fits
from serve.agent.argv import Bind, TlsFiles, engine_argv
from tests.unit.sizing.models_page import FACTS, page, rooms_of_sites, source_of, wish_of
from tests.unit.sizing.test_source import a_site

NAMES = list(recipes())
ROOMS = tuple({(room.gpus, room.gpu_bytes, room.host_bytes): room for room in rooms_of_sites()}.values())
FITS_NOWHERE = {"deepseek-v3.1", "deepseek-r1-0528"}
"""On no node of those sites: 671 GB of weights."""
ROOT = Path(__file__).parents[3]


def entry(name: str, **more: object) -> Model:
    document = {"models": {name: {**recipes()[name].entry(), **more}}}
    return parse_catalog(document, "recipes", unsized=True).find(name)


def test_there_are_about_forty_and_the_facts_of_each() -> None:
    assert len(NAMES) >= 30
    assert set(NAMES) == set(FACTS)
    assert {recipe.task for recipe in recipes().values()} == {"generate", "embed", "rerank", "transcribe"}


@pytest.mark.parametrize("name", NAMES)
def test_its_options_are_accepted_and_have_a_source(name: str) -> None:
    recipe, model = recipes()[name], entry(name)
    assert bool(recipe.documents) >= bool(recipe.args), "options come from a document"
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.source)
    tls = TlsFiles(Path("key"), Path("crt"), Path("ca"))
    argv = engine_argv(model, model.source, Bind("h", 1), tls)
    assert argv[-len(recipe.args) :] == recipe.args or not recipe.args


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_the_sites_or_says_why_not(name: str) -> None:
    recipe = recipes()[name]
    found = fits(source_of(recipe), ROOMS, wish_of(recipe))
    assert all(fit.engine is not None or fit.because for fit in found)
    assert any(fit.engine is not None for fit in found) == (name not in FITS_NOWHERE)
    for fit, room in zip(found, ROOMS, strict=True):
        if fit.engine is not None:
            assert fit.engine.gib * GIB <= (room.gpu_bytes or room.host_bytes)


@pytest.mark.parametrize("name", sorted(set(NAMES) - FITS_NOWHERE))
def test_its_memory_is_worked_out_as_it_is_planned(name: str) -> None:
    recipe = recipes()[name]
    first = next(fit for fit in fits(source_of(recipe), ROOMS, wish_of(recipe)) if fit.engine is not None)
    room = next(room for room in ROOMS if room.name == first.node_type)
    assert first.engine is not None
    found = sized(entry(name, gpus=first.engine.gpus), source_of(recipe), (room,))
    assert found.engine == first.engine


def test_what_is_too_large_is_refused_with_numbers() -> None:
    with pytest.raises(Unsized, match=r"its weights take \d+\.\d GiB on each of 4 GPUs"):
        sized(entry("deepseek-v3.1", gpus=4), source_of(recipes()["deepseek-v3.1"]), ROOMS)


def test_its_parsers_are_vllms() -> None:
    vllm = util.find_spec("vllm")
    if vllm is None or not vllm.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    place = Path(next(iter(vllm.submodule_search_locations)))
    for option, package in (("--tool-call-parser", "tool_parsers"), ("--reasoning-parser", "reasoning")):
        known = set(re.findall(r'^    "([\w-]+)": \(', (place / package / "__init__.py").read_text(), re.MULTILINE))
        for recipe in recipes().values():
            if option in recipe.args:
                assert recipe.args[recipe.args.index(option) + 1] in known, recipe.name


def test_the_page_lists_them_as_they_are() -> None:
    """``python -m tests.unit.sizing.models_page > docs/models.md`` makes it anew."""
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8").strip() == page().strip()


def test_the_command_lists_and_shows_them() -> None:
    listed = CliRunner().invoke(cli, ["models", "recipes", "--json"], catch_exceptions=False)
    assert [one["recipe"] for one in json.loads(listed.output)] == NAMES
    for said in ("gpt-oss-20b", "GPT-OSS-20B", "openai/gpt-oss-20b"):
        shown = CliRunner().invoke(cli, ["models", "recipes", said], catch_exceptions=False)
        assert "source: openai/gpt-oss-20b" in shown.output
        assert "https://github.com/vllm-project/recipes" in shown.output
    unknown = CliRunner().invoke(cli, ["models", "recipes", "nothing"], catch_exceptions=False)
    assert unknown.exit_code != 0
    assert "no recipe 'nothing'" in unknown.output


def test_a_recipe_is_added_with_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def described(name: str, token_file: Path | None = None) -> object:
        return source_of(find_recipe(name))

    monkeypatch.setattr("gateway_plugin.sizing.source.read_source", described)
    models, site = tmp_path / "models.yaml", a_site(tmp_path)
    words = ["--state", str(tmp_path / "state"), "models", "add"]
    for name in ("magistral-small", "qwen3-reranker-0.6b", "whisper-large-v3"):
        more = ["--models", str(models), "--site", str(site), "--gpus", "2" if name.startswith("m") else "1"]
        done = CliRunner(env={"GATEWAY_URL": ""}).invoke(cli, [*words, name, *more], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    magistral, reranker, whisper = load_catalog(models).models
    assert magistral.source == "mistralai/Magistral-Small-2507"
    assert magistral.args.count("--max-model-len") == 1
    assert magistral.args[:2] == ("--max-model-len", "40960")
    assert magistral.args[-2:] == ("--reasoning-parser", "mistral")
    assert "huggingface.co/mistralai" in models.read_text()
    assert (reranker.task, whisper.task) == ("rerank", "transcribe")
    assert json.loads(reranker.args[-1])["is_original_qwen3_reranker"]
