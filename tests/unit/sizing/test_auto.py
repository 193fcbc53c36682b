"""``memory_gib: auto``: worked out when a catalog is read, from the entry's own options; kept for the next time."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gateway_plugin.catalog import Model, catalog_document, load_catalog, parse_catalog
from gateway_plugin.cli.main import cli
from gateway_plugin.errors import ConfigError, NotFound, ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.site import NodeType, Site
from gateway_plugin.sizing.architecture import parse_config
from gateway_plugin.sizing.auto import Unsized, sized
from gateway_plugin.sizing.catalog_file import read_catalog
from gateway_plugin.sizing.estimate import cache_bytes
from gateway_plugin.sizing.kept import Kept
from gateway_plugin.sizing.plan import GIB, Room, Source
from tests.unit.sizing.published import PUBLISHED
from tests.unit.sizing.test_source import a_site

A100 = Room("a100", 4, 38 * GIB, 0)
CPU = Room("cpu", 0, 0, 30 * GIB)
COMMIT = "c" * 40


def source(name: str) -> Source:
    return Source(name, parse_config(PUBLISHED[name][1]))


def model(*args: str, gpus: int = 1, **more: Any) -> Model:
    return Model(name="m", source="org/m", gpus=gpus, args=args, **more)


def test_an_entry_that_says_nothing_gets_the_context_that_room_was_made_for() -> None:
    found = sized(model(), source("Llama-3.1-8B"), (A100,)).applied(model())
    assert found.args == ("--max-model-len", "16384")
    assert found.predicted_gib == found.memory_gib
    assert 25 < found.memory_gib < 30  # 15 of weights, 8 of cache, the rest for the engine


@pytest.mark.parametrize(
    ("args", "change_gib"),
    [
        (("--max-model-len", "8k"), -4.2),  # 8,000 of 16,384 tokens, four times 128 KiB
        (("--max-num-seqs", "2"), -4),
        (("--max-num-seqs", "64"), 0),
        (("--kv-cache-dtype", "fp8"), -4),
        (("--quantization=fp8",), -6.5),
        (("--kv-cache-memory-bytes", "3G", "--max-model-len", "16384"), -5),
        (("--max-model-len", "131072", "--max_model_len", "8192"), -4),
    ],
)
def test_the_entrys_own_options_count(args: tuple[str, ...], change_gib: float) -> None:
    plain = sized(model(), source("Llama-3.1-8B"), (A100,)).engine.total / GIB
    assert sized(model(*args), source("Llama-3.1-8B"), (A100,)).engine.total / GIB - plain == pytest.approx(
        change_gib, abs=0.3
    )


def test_more_gpus_take_less_on_each() -> None:
    one, two = (sized(model(gpus=n), source("Llama-3.1-8B"), (A100,)).engine for n in (1, 2))
    assert two.weights == pytest.approx(one.weights / 2, rel=0.01)


def test_the_cache_that_is_given_bounds_the_context() -> None:
    found = sized(model("--kv-cache-memory-bytes", "1G"), source("Llama-3.1-8B"), (A100,))
    assert found.args == ("--max-model-len", "8192")
    assert found.engine.cache == GIB
    with pytest.raises(Unsized, match=r"holds 8192 tokens.*may have 16000"):
        sized(model("--kv-cache-memory-bytes", "1G", "--max-model-len", "16k"), source("Llama-3.1-8B"), (A100,))


def test_without_a_gpu_vllm_is_given_the_cache_that_was_counted() -> None:
    found = sized(model(gpus=0), source("SmolLM2-135M"), (A100, CPU))
    cache = cache_bytes(source("SmolLM2-135M").architecture, 8192, 4, 1, 4.0)
    assert found.args == ("--kv-cache-memory-bytes", str(cache))
    assert sized(model(gpus=0), source("all-MiniLM-L6-v2"), (CPU,)).args == (), "an encoder has no cache"
    half = sized(model("--dtype", "bfloat16", gpus=0), source("SmolLM2-135M"), (CPU,)).engine
    assert half.weights * 2 == found.engine.weights


@pytest.mark.parametrize(
    ("entry", "name", "words"),
    [
        (model(gpus=8), "Llama-3.1-8B", "a100: 8 GPUs are asked for, a node has 4"),
        (model(gpus=0), "Llama-3.1-8B", "without GPUs.*cpu: it needs"),
        (model(), "DeepSeek-V3", "its weights take"),
        (model("--max-model-len", "200000"), "Llama-3.1-8B", "made for 131072 tokens"),
        (model("--speculative-config", "{}"), "Llama-3.1-8B", "--speculative-config takes is not counted"),
        (model(adapters={"x": "/adapters/x"}), "Llama-3.1-8B", "adapters take is not counted"),
        (model(adapters={}), "Llama-3.1-8B", "adapters take is not counted"),
        (model(engine="command", command=["x", "{port}"]), "Llama-3.1-8B", "'engine: command' takes is not known"),
    ],
)
def test_what_cannot_be_worked_out_says_why(entry: Model, name: str, words: str) -> None:
    with pytest.raises(Unsized, match=words):
        sized(entry, source(name), (A100, CPU))


def test_transformers_works_on_one_request_at_a_time() -> None:
    entry = model(gpus=0).model_copy(update={"engine": "transformers"})
    found = sized(entry, source("SmolLM2-135M"), (CPU,))
    assert found.args == ()
    measured_gib = 1.02  # with a request of 7,200 tokens, which leaves it so
    assert found.engine.total / GIB == pytest.approx(measured_gib, rel=0.15)
    with pytest.raises(Unsized, match="one GPU, or none"):
        sized(entry.model_copy(update={"gpus": 2}), source("SmolLM2-135M"), (CPU,))


def test_files_that_lie_are_planned_with_the_larger() -> None:
    lies = replace(source("Llama-3.1-8B"), file_bytes=GIB)
    assert sized(model(), lies, (A100,)).engine.weights == 2 * 8_030_261_248


# --- a file ---
def the_site(folder: Path) -> Site:
    from parsl.providers import LocalProvider

    cpu = NodeType(name="cpu", provider=LocalProvider(), cpus=2, engine_memory_gib=30)
    gpu = NodeType(name="gpu", provider=LocalProvider(), cpus=2, gpus=2, gpu_memory_gib=38)
    return Site(name="s", node_types=(cpu, gpu))


def folder_of(place: Path, name: str) -> Path:
    folder = place / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name][1]))
    return folder


def test_a_catalog_is_read_with_every_memory_worked_out(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "SmolLM2-135M")
    file = tmp_path / "models.yaml"
    file.write_text(
        f"models:\n  a: {{source: {folder}, memory_gib: auto}}\n  b: {{source: {folder}, args: [--max-num-seqs, 2]}}\n"
        "  c: {source: org/c, memory_gib: 7}\n"
    )
    found = {one.name: one for one in read_catalog(file, the_site(tmp_path)).models}
    assert list(found) == ["a", "b", "c"]
    assert found["a"].memory_gib > found["b"].memory_gib > 2
    assert (found["c"].memory_gib, found["c"].predicted_gib) == (7, None)
    document = catalog_document(read_catalog(file, the_site(tmp_path)))
    assert parse_catalog(document, "again").find("a") == found["a"], "controller and agents see numbers only"
    with pytest.raises(ConfigError, match=r"models\.a\.memory_gib: expected GiB"):
        load_catalog(file)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no config.json"),
        ({"config.json": "{}"}, "names no architecture"),
        ({"config.json": json.dumps({**PUBLISHED["Llama-3.1-8B"][1], "num_attention_heads": None})}, "num_attention"),
        ({"config.json": json.dumps(PUBLISHED["Llama-3.1-8B"][1]), "m.gguf": "x"}, "GGUF"),
    ],
    ids=["empty", "no architecture", "no heads", "GGUF"],
)
def test_a_model_without_an_estimate_is_asked_for_by_name(tmp_path: Path, files: dict[str, str], words: str) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    file = tmp_path / "models.yaml"
    file.write_text(f"models:\n  odd-one: {{source: {folder}}}\n")
    with pytest.raises(ConfigError, match=words) as refused:
        read_catalog(file, the_site(tmp_path))
    assert f"{file}: models.odd-one.memory_gib: cannot be worked out: " in refused.value.message
    assert refused.value.message.endswith("; say it yourself, in GiB")
    assert "\n" not in refused.value.message


# --- what is kept ---
class Hub:
    """Answers, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.down = False

    def __call__(self, name: str) -> Source:
        self.asked.append(name)
        if self.down:
            raise ServiceError("The hub cannot be asked.")
        return replace(source("Llama-3.2-1B"), revision=COMMIT, file_bytes=5)


def test_a_commit_is_asked_for_once_and_a_branch_once_a_day(tmp_path: Path) -> None:
    hub, clock, file = Hub(), [1000.0], tmp_path / "cache" / "sizes.json"

    def ask(name: str) -> Source:
        return Kept(file, lambda: clock[0]).source(name, hub)  # a new one: as after a restart

    first = ask(f"org/a@{COMMIT}")
    assert asdict(ask(f"org/a@{COMMIT}")) == asdict(first)
    ask("org/a")
    ask("org/a")
    assert hub.asked == [f"org/a@{COMMIT}", "org/a"]
    assert file.stat().st_mode & 0o777 == 0o600
    clock[0] += 100_000
    hub.down = True
    assert ask("org/a").file_bytes == 5, "as it was, where the hub cannot be reached"
    assert ask(f"org/a@{COMMIT}") == first
    assert hub.asked[2:] == ["org/a"]
    with pytest.raises(ServiceError):
        ask("org/other")


def test_what_is_kept_is_bounded_and_garbage_is_not_used(tmp_path: Path) -> None:
    hub, file = Hub(), tmp_path / "sizes.json"
    clock = iter(range(1000))
    kept = Kept(file, lambda: float(next(clock)))
    for number in range(260):
        kept._keep(f"org/{number}", source("Llama-3.2-1B"))
    names = json.loads(file.read_text())["sources"]
    assert len(names) == 256
    assert "org/0" not in names
    whole = json.loads(file.read_text())
    for content in ("", "[]", "{}", json.dumps({**whole, "format": 0}),
                    json.dumps({**whole, "sources": {"org/259": {"at": 1, "source": {"name": "x"}}}})):  # fmt: skip
        file.write_text(content)
        Kept(file).source(f"org/259@{COMMIT}", hub)
    assert len(hub.asked) == 5
    file.chmod(0o666)
    Kept(file).source(f"org/259@{COMMIT}", hub)
    assert len(hub.asked) == 6, "others could have written it"


def a_snapshot(cache: Path, *weights: str) -> None:
    folder = cache / "models--org--a" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED["Llama-3.2-1B"][1]))
    for name in weights:
        (folder / name).write_text("12345")


def test_weights_that_lie_on_disk_need_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, sites = tmp_path / "hub", tmp_path / "weights"
    monkeypatch.setenv("HF_HUB_CACHE", str(own))
    a_snapshot(own)
    found = Kept(tmp_path / "sizes.json").source(f"org/a@{COMMIT}")
    assert (found.name, found.revision, found.file_bytes) == ("org/a", COMMIT, 0)
    assert found.architecture.parameters == 1_235_814_400
    a_snapshot(sites, "model.safetensors")
    found = Kept(tmp_path / "sizes.json", weights_folder=sites).source(f"org/a@{COMMIT}")
    assert found.file_bytes == 5, "of the one that is whole"


def test_a_catalog_is_read_without_a_hub_where_its_weights_are_in_the_sites_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("gateway_plugin.sizing.kept.cache_root", lambda: tmp_path / "cache")
    pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    a_snapshot(tmp_path / "weights", "model.safetensors")
    file = tmp_path / "models.yaml"
    file.write_text(f"models:\n  a: {{source: org/a@{COMMIT}, gpus: 1}}\n")
    site = the_site(tmp_path).model_copy(update={"weights_folder": tmp_path / "weights"})
    (found,) = read_catalog(file, site).models
    assert found.memory_gib > 2


def test_a_model_that_is_not_there_is_not_taken_from_what_is_kept(tmp_path: Path) -> None:
    def gone(name: str) -> Source:
        raise NotFound("The hub has no such model.")

    kept = Kept(tmp_path / "sizes.json", lambda: 1e9)
    kept._keep("org/a", source("Llama-3.2-1B"))
    with pytest.raises(NotFound):
        Kept(tmp_path / "sizes.json", lambda: 2e9).source("org/a", gone)


def test_a_model_whose_licence_is_no_utf8_is_used_and_not_kept(tmp_path: Path) -> None:
    def hub(name: str) -> Source:
        return replace(source("Llama-3.2-1B"), license="\ud800")

    assert Kept(tmp_path / "sizes.json").source("org/a", hub).license == "\ud800"
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_reads_it_for_the_last_site_and_names_what_it_cannot_work_out(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "state")
    layout.state.mkdir(mode=0o700)
    site = a_site(tmp_path)
    layout.service_json.write_text(json.dumps({"site": "s", "site_reference": str(site)}))
    file = tmp_path / "models.yaml"
    runner = CliRunner(env={"GATEWAY_URL": ""})
    words = ["--state", str(layout.state), "models", "apply", str(file)]
    file.write_text(f"models:\n  big: {{source: {folder_of(tmp_path, 'Llama-3.3-70B')}, gpus: 2}}\n")
    refused = runner.invoke(cli, words, catch_exceptions=False)
    assert refused.exit_code == 2
    assert f"{file}: models.big.memory_gib: cannot be worked out: it fits on no node type with 2 GPUs: gpu: its" in (
        " ".join(refused.output.split())
    )
    file.write_text(f"models:\n  small: {{source: {folder_of(tmp_path, 'Llama-3.2-1B')}, gpus: 2}}\n")
    unreached = runner.invoke(cli, words, catch_exceptions=False)
    assert unreached.exit_code not in (0, 2), "read, and then there is no gateway"
