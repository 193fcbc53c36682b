"""LoRA adapters in the catalog: what is refused, what an engine is started with, what changes without a reload."""

from __future__ import annotations

import asyncio
import errno
import json
from pathlib import Path
from typing import Any

import pytest

from gateway_plugin.adapter_folders import adapter_folder, on_disk
from gateway_plugin.catalog import Catalog, Model, catalog_document, parse_catalog
from gateway_plugin.errors import ConfigError, ServiceError
from gateway_plugin.service.preflight import failures, weights
from serve.agent.argv import Bind, TlsFiles, engine_argv, engine_env
from serve.controller import deployment
from serve.controller.adapters import adapt_engines, new_adapters, updates
from serve.controller.deployment import Controller
from serve.core import events as ev
from serve.core.effects import DrainRoute, StopEngine, SyncSlots
from serve.core.handlers.admin import adapters_only
from serve.ingress.listing import card, cards
from tests.support.fleets import Story, a_model, begin

TLS = TlsFiles(Path("/k"), Path("/c"), Path("/a"))
TAKES = ["{python}", "--port", "{port}", "--lora-modules", "{adapters}", "--names={names}"]


def parsed(**entry: Any) -> Model:
    return parse_catalog({"models": {"base": {"source": "/w", "memory_gib": 1, **entry}}}, "models.yaml").models[0]


def adapter(folder: Path, **config: object) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return str(folder)


def argv(model: Model) -> tuple[str, ...]:
    return engine_argv(model, "/w", Bind("127.0.0.1", 1), TLS)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"adapters": {"base": "/x"}}, "the name 'base' of model 'base' is taken by model 'base'"),
        ({"adapters": {"a": "/x"}, "aliases": ["a"]}, "the name 'a' of model 'base' is taken"),
        ({"adapters": {"a;b": "/x"}}, "models.base.adapters: a model name matches"),
        ({"adapters": {"a": "x/y"}}, "a: expected a folder in full, such as /adapters/a, got x/y"),
        ({"adapters": {"a": None}}, "a: expected a folder in full"),
        ({"adapters": {5: "/x"}}, "an adapter's name is text"),
        ({"adapters": ["a=/x"]}, "expected a mapping of names to folders"),
        ({"adapters": {"a": "/x/$USER"}}, "models.base.adapters.a: '/x/$USER': no shell fills in variables"),
        ({"adapters": {"a": "/x,/y"}}, "without commas"),
        ({"adapters": {"a": "/x"}, "args": ["--lora-modules", "b=/y"], "aliases": ["b"]}, "names them already"),
        ({"adapters": {"a": "/x"}, "engine": "command", "command": ["run", "{port}"]}, "no word has '{adapters}'"),
        ({"engine": "command", "command": TAKES}, "'{adapters}' needs adapters"),
    ],
)
def test_adapters_that_could_not_be_served_are_refused_in_a_line(entry: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parsed(**entry)
    assert says in refused.value.message
    assert "\n" not in refused.value.message


def test_a_name_of_another_entry_is_taken() -> None:
    models = {
        "base": {"source": "/w", "memory_gib": 1, "adapters": {"b": "/x"}},
        "b": {"source": "/w", "memory_gib": 1},
    }
    with pytest.raises(ConfigError, match="the name 'b' of model 'b' is taken by model 'base'"):
        parse_catalog({"models": models}, "models.yaml")


def test_they_are_names_of_their_base_and_survive_the_catalogs_document() -> None:
    model = parsed(adapters={"a": "/x", "org/b": "~/y"}, aliases=["c"])
    catalog = Catalog(models=(model,))
    assert model.names == ("base", "c", "a", "org/b")
    assert catalog.find("org/b") is model
    assert parse_catalog(catalog_document(catalog), "again").models == (model,)
    assert parse_catalog(catalog_document(Catalog(models=(parsed(adapters={}),))), "again").models[0].adapters == {}


def test_vllm_is_started_with_them_and_with_room_for_their_rank(tmp_path: Path) -> None:
    small, large = adapter(tmp_path / "small", r=8), adapter(tmp_path / "large", r=48)
    words = argv(on_disk(parsed(adapters={"a": small, "b": large}, aliases=["c"], args=["--max-loras", "1"])))
    at = words.index("--lora-modules")
    assert words[at - 1 : at + 3] == ("--enable-lora", "--lora-modules", f"a={small}", f"b={large}")
    names = words.index("--served-model-name")
    assert words[names + 1 : words.index("--host")] == ("base", "c")
    assert words[words.index("--max-lora-rank") + 1] == "64"
    assert words[-2:] == ("--max-loras", "1"), "the entry's own options come last"
    assert "--enable-lora" in argv(on_disk(parsed(adapters={})))
    assert "--lora-modules" not in argv(on_disk(parsed(adapters={})))
    assert "--enable-lora" not in argv(on_disk(parsed()))


def test_an_engine_takes_more_of_them_while_it_runs_only_where_the_entry_has_some() -> None:
    name = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
    for adapters, expected in (({"a": "/x"}, "1"), ({}, "1"), (None, None)):
        assert engine_env(parsed(adapters=adapters), "k", (), (), {}).get(name) == expected


def test_a_command_gets_a_word_for_each() -> None:
    model = parsed(adapters={"a": "/x", "b": "/y"}, engine="command", command=TAKES, aliases=["c"])
    assert argv(model)[3:] == ("--lora-modules", "a=/x", "b=/y", "--names=base", "--names=c")
    assert "{adapters}" not in " ".join(argv(model.model_copy(update={"adapters": {}})))


@pytest.mark.parametrize("config", [None, "{", "[]", "no json"])
def test_a_folder_without_an_adapter_is_named(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(ConfigError, match=r"adapters\.a: there is no LoRA adapter in"):
        adapter_folder("a", str(tmp_path))
    (found,) = failures(weights(Catalog(models=(parsed(source="org/m@main", adapters={"a": str(tmp_path)}),))))
    assert (found.name, found.advice) == ("adapters of base", "correct its folder in the catalog")


def safetensors(file: Path, **shapes: tuple[str, list[int]]) -> None:
    said = {name.replace("_0_", ".0."): {"dtype": kind, "shape": shape} for name, (kind, shape) in shapes.items()}
    header = json.dumps({"__metadata__": {}, **said}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    ("a", "b", "base", "wrong"),
    [
        ([8, 576], [192, 8], ("BF16", [192, 576]), ""),
        ([8, 64], [192, 8], ("BF16", [192, 576]), "is for 64 values, and layers.0.q.weight has 576"),
        ([8, 576], [64, 8], ("F32", [192, 576]), "is for 64 values, and layers.0.q.weight has 192"),
        ([8, 576], [192, 8], ("U8", [192, 288]), ""),
        ([8, 576], [192, 8], ("BF16", [192]), ""),
    ],
    ids=["fits", "in", "out", "packed", "no-matrix"],
)
def test_an_adapter_of_another_base_is_seen_by_its_shapes(
    tmp_path: Path, a: list[int], b: list[int], base: tuple[str, list[int]], wrong: str
) -> None:
    folder, weights_folder = Path(adapter(tmp_path / "a")), tmp_path / "base"
    weights_folder.mkdir()
    lora = {
        "base_model.model.layers_0_q.lora_A.weight": ("F32", a),
        "base_model.model.layers_0_q.lora_B.weight": ("F32", b),
    }
    safetensors(folder / "adapter_model.safetensors", **lora, other=("F32", [1]))
    (weights_folder / "model-1.safetensors").write_bytes(b"garbled")
    safetensors(weights_folder / "model-2.safetensors", layers_0_q_0_weight=("U8", [1]), **{"layers_0_q.weight": base})
    model = parsed(source=str(weights_folder), adapters={"a": str(folder)})
    if wrong:
        with pytest.raises(ConfigError, match=wrong):
            on_disk(model)
    else:
        on_disk(model)


@pytest.mark.parametrize("rank", ["8", None, True, -1, 0])
def test_an_odd_rank_is_the_usual_one(tmp_path: Path, rank: object) -> None:
    assert adapter_folder("a", adapter(tmp_path / "a", r=rank))[1] == 16


def test_each_has_a_card_with_its_parent() -> None:
    entries = [{"id": "base", "aliases": ["c"], "adapters": ["a"]}, {"id": "other", "aliases": []}]
    assert [(one["id"], one["root"], one["parent"]) for one in cards(entries)] == [
        ("base", "base", None), ("c", "base", None), ("a", "base", "base"), ("other", "other", None),
    ]  # fmt: skip
    assert card(entries, "a")["parent"] == "base"


# --- a catalog that changes while an engine runs ---
def loaded(**entry: Any) -> Story:
    story = begin(a_model("a", **entry))
    story.ask("a")
    story.loaded("a")
    return story


def test_an_engine_that_serves_the_new_adapters_stays_and_their_names_are_routed() -> None:
    story = loaded(adapters={"x": "/x"})
    after = a_model("a", adapters={"x": "/x", "y": "/y"})
    (update,) = updates(story.fleet, (after,))
    assert (update.engine, update.node, update.adapters) == (story.engine("a").id, "cpu-0-0", {"x": "/x", "y": "/y"})
    story.on(ev.CatalogChanged((after,), frozenset({update.engine})))
    assert not story.said(DrainRoute)
    assert story.said(SyncSlots)[-1].names.keys() == {"a", "x", "y"}
    assert story.ask("y") in story.answers()


def test_an_engine_that_does_not_is_loaded_again() -> None:
    story = loaded(adapters={"x": "/x"})
    story.on(ev.CatalogChanged((a_model("a", adapters={"y": "/y"}),)))
    assert story.said(DrainRoute)


def test_one_that_still_loads_is_started_again_with_them() -> None:
    story = begin(a_model("a", adapters={"x": "/x"}))
    story.ask("a")
    after = a_model("a", adapters={})
    assert updates(story.fleet, (after,)) == ()
    story.on(ev.CatalogChanged((after,)))
    assert story.said(StopEngine)


@pytest.mark.parametrize(
    ("after", "only"),
    [
        ({"adapters": {}}, True),
        ({"adapters": {"y": "/y"}, "keep_alive": 9}, True),
        ({"adapters": {"x": "/x"}}, False),
        ({}, False),
        ({"adapters": {"y": "/y"}, "args": ("--dtype", "float32")}, False),
        ({"adapters": {"y": "/y"}, "aliases": ("z",)}, False),
    ],
)
def test_what_is_more_than_a_change_of_adapters(after: dict[str, Any], only: bool) -> None:
    assert adapters_only(a_model("a", adapters={"x": "/x"}), a_model("a", **after)) is only
    assert not adapters_only(a_model("a"), a_model("a", adapters={})), "it was started without them"


async def test_engines_are_asked_and_a_bad_adapter_refuses_the_catalog(tmp_path: Path) -> None:
    story = loaded(adapters={"x": "/gone"})
    after = a_model("a", adapters={"x": "/gone", "y": adapter(tmp_path / "y")})
    assert [name for _, name, _ in new_adapters(story.fleet, (after,))] == ["y"]
    asked: list[tuple[Any, ...]] = []

    def answering(answer: tuple[str, str] | Exception) -> Any:
        async def call(*arguments: Any) -> tuple[str, str]:
            asked.append(arguments)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    engine = story.engine("a").id
    assert await adapt_engines(story.fleet, (after,), answering(("done", ""))) == {engine}
    assert asked == [("cpu-0-0", "adapt", engine, dict(after.adapters or {}))]
    for failure in (("reload", "no such path"), KeyError("cpu-0-0"), AttributeError("adapt"), TimeoutError()):
        assert await adapt_engines(story.fleet, (after,), answering(failure)) == frozenset()
    asked.clear()
    with pytest.raises(ConfigError, match="refuses an adapter: no weights"):
        await adapt_engines(story.fleet, (after,), answering(("refused", "no weights")))
    assert [adapters for *_, adapters in asked] == [after.adapters, {"x": "/gone"}], "the present catalog's again"
    asked.clear()
    with pytest.raises(ConfigError, match="no LoRA adapter in /nowhere"):
        await adapt_engines(story.fleet, (a_model("a", adapters={"z": "/nowhere"}),), answering(("done", "")))
    assert not asked


async def test_a_catalog_whose_caller_leaves_or_that_cannot_be_written_leaves_no_engine_with_its_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = loaded(adapters={"x": "/gone"})
    y = adapter(tmp_path / "y")
    (tmp_path / "logs").mkdir()
    controller = Controller(str(tmp_path), story.fleet.policy, lambda *_: (object, ()))
    controller.fleet = story.fleet
    asked: list[dict[str, str]] = []

    async def call(node: str, verb: str, engine: str, adapters: dict[str, str]) -> tuple[str, str]:
        asked.append(adapters)
        await asyncio.sleep(0.05)
        return "done", ""

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(controller._agents, "call", call)
    monkeypatch.setattr(deployment, "write_private", full)
    document = catalog_document(Catalog(models=(a_model("a", adapters={"x": "/gone", "y": y}),)))
    assert isinstance(await controller.apply(document), ServiceError)
    assert asked == [{"x": "/gone", "y": y}, {"x": "/gone"}]
    monkeypatch.undo()
    monkeypatch.setattr(controller._agents, "call", call)
    asked.clear()
    leaving = asyncio.create_task(controller.apply(document))

    def changes() -> list[ev.CatalogChanged]:
        return [event for event in controller._mailbox._queue if isinstance(event, ev.CatalogChanged)]  # type: ignore[attr-defined]

    async with asyncio.timeout(30):
        while not asked:
            await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        while not changes():
            await asyncio.sleep(0.01)
    (changed,) = changes()
    assert changed.adapted == {story.engine("a").id}
    for task in controller._tasks:
        task.cancel()
