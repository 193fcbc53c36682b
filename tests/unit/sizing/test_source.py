"""Reading a model's facts: from a folder, and with the hub's own client from a stand-in hub on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway_plugin.catalog import catalog_document, load_catalog
from gateway_plugin.cli.main import cli
from gateway_plugin.errors import ConfigError, GatewayError, NotFound, ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.sizing.entry import add_entry, entry_text
from gateway_plugin.sizing.plan import Room, Wish, fits
from gateway_plugin.sizing.source import read_source
from tests.support.hub import SHA, Repository, serving
from tests.unit.sizing.published import PUBLISHED

CONFIG = json.dumps(PUBLISHED["Llama-3.2-1B"][1]).encode()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """``org/small``; ``org/gated``, which needs the token; ``org/odd``, its config not JSON; ``org/huge``."""
    sizes = {"model.safetensors": 2_471_645_608, "original/consolidated.00.pth": 5}
    small = Repository({"config.json": CONFIG}, licence="llama3.2", said_sizes=sizes)
    gated, odd = replace(small, gated=True), replace(small, files={"config.json": b"<html>"})
    huge = replace(small, said_sizes={"config.json": 1 << 40})
    with serving({"org/small": small, "org/gated": gated, "org/odd": odd, "org/huge": huge}) as found:
        found.here(monkeypatch, tmp_path / "hub")
        yield found.url


def test_metadata_of_the_hub(hub: str) -> None:
    found = read_source("org/small")
    assert (found.revision, found.license, found.file_bytes) == (SHA, "llama3.2", 2_471_645_608)
    assert found.architecture.parameters == 1_235_814_400
    assert found.doubt == ""


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("org/none", NotFound, "check the name and the token"),
        ("org/small@nowhere", NotFound, "no revision 'nowhere'"),
        ("org/gated", ServiceError, "accept its licence"),
        ("org/odd", ConfigError, "not JSON"),
        ("org/huge", ConfigError, "its config.json has 1099511627776 bytes"),
        ("org/a@b@c", ConfigError, "org/name@REVISION"),
        ("/nowhere/at/all", ConfigError, "^there is no folder"),
        ("prepared:nothing", ConfigError, "^no recipe 'nothing'"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_what_to_do(
    hub: str, name: str, error: type[GatewayError], words: str
) -> None:
    with pytest.raises(error, match=words):
        read_source(name)


def test_a_token_comes_from_a_file_that_others_cannot_read(hub: str, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hf_right\n")
    token.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_source("org/gated", token)
    token.chmod(0o600)
    assert read_source("org/gated", token).gated


def test_a_hub_that_cannot_be_reached(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match="cannot be asked for org/small"):
        read_source("org/small")


def a_site(folder: Path) -> Path:
    site = folder / "site.py"
    site.write_text(
        "from parsl.providers import LocalProvider\n"
        "from gateway_plugin.site import NodeType, Site\n"
        "site = Site(name='s', node_types=(\n"
        "    NodeType(name='cpu', provider=LocalProvider(), cpus=2, engine_memory_gib=3),\n"
        "    NodeType(name='gpu', provider=LocalProvider(), cpus=2, gpus=2, gpu_memory_gib=38),))\n"
    )
    return site


def test_plan_and_add(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = a_site(tmp_path)
    models = tmp_path / "models.yaml"
    models.write_text("# ours\nmodels:\n    old:   # keep\n        source: org/old\n        memory_gib: 1\n")

    def gateway(*words: str) -> tuple[int, str]:
        done = CliRunner(env={"GATEWAY_URL": ""}).invoke(
            cli, ["--state", str(tmp_path / "state"), "models", *words], catch_exceptions=False
        )
        return done.exit_code, done.output

    code, words = gateway("plan", "org/small", "--site", str(site), "--json")
    found = {fit["node_type"]: fit for fit in json.loads(words)["fits"]}
    assert (code, found["cpu"]["fits"], found["gpu"]["gpus"]) == (0, False, 1)
    for columns in ("80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        code, words = gateway("plan", "org/small", "--site", str(site))
        assert code == 0
        for said in ("16384", "sequences", "131072 tokens", f"cpu: no: {found['cpu']['reason']}\n"):
            assert said in words, "nothing is cut"
    code, words = gateway("add", "org/small", "--as", "small", "--site", str(site), "--models", str(models))
    assert code == 0, words
    assert "no gateway runs" in words
    entries = {model.name: model for model in load_catalog(models).models}
    assert entries["small"].source == f"org/small@{SHA}"
    assert entries["small"].gpus == 1
    assert 3 < entries["small"].memory_gib < 8
    assert models.read_text().startswith("# ours\nmodels:\n    old:   # keep\n")
    code, words = gateway("add", "org/small", "--as", "small", "--site", str(site), "--models", str(models))
    assert code == 2
    assert words == f"error: {models} has a model called 'small' already: remove that entry, or say --as NAME.\n"
    assert load_catalog(models).models == tuple(entries.values()), "a refused entry changes nothing"
    code, words = gateway("plan", "lama-8b", "--site", str(site))
    assert (code, "It is no recipe either: 'gateway models recipes' lists them." in words) == (66, True), words
    code, words = gateway("add", "org/small", "--gpus", "4", "--site", str(site), "--dry-run")
    assert code != 0
    assert "a node has 2" in words


ENTRY = "  new:\n    # why\n    source: org/new\n    memory_gib: 2\n"
OLD = "models:\n    old:   # keep\n        source: org/old\n        memory_gib: 1\n"


@pytest.mark.parametrize(
    "before",
    [
        OLD,
        OLD.rstrip(),
        OLD.replace("\n", "\r\n"),
        "---\n" + OLD,
        OLD + "        env: {X: a}\n\n# end\n",
        OLD + "        env:\n          X: |+\n            kept\n\n\n",
        "models:\n  old: {source: org/old, memory_gib: 1}\n",
    ],
    ids=["block", "no end of line", "CRLF", "document", "comment at the end", "kept lines", "flow entry"],
)
def test_an_entry_is_added_and_all_else_stays(tmp_path: Path, before: str) -> None:
    models = tmp_path / "models.yaml"
    models.write_bytes(before.encode())
    models.chmod(0o640)
    old = load_catalog(models).models
    link = tmp_path / "link.yaml"
    link.symlink_to("models.yaml")
    add_entry(link, ENTRY)
    after = models.read_bytes().decode()
    assert after.startswith(before)
    assert ("\n" in after.replace("\r\n", "")) != ("\r\n" in before)
    assert load_catalog(models).models[:-1] == old
    assert load_catalog(link).models[-1].source == "org/new"
    assert link.is_symlink()
    assert models.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("between", ["", "\n# what they run in\n"])
def test_an_entry_is_added_to_the_models_though_runtimes_follow(tmp_path: Path, between: str) -> None:
    models = tmp_path / "models.yaml"
    runtimes = between + "runtimes:\n  own:\n    python: /sw/env/bin/python\n"
    models.write_text(OLD + runtimes)
    add_entry(models, ENTRY)
    assert models.read_text() == OLD + ENTRY.replace("  ", "    ", 1).replace("\n    ", "\n      ") + runtimes
    assert [model.name for model in load_catalog(models).models] == ["old", "new"]
    models.write_text(runtimes + OLD)
    add_entry(models, ENTRY)
    assert [model.name for model in load_catalog(models).models] == ["old", "new"]


def test_of_entries_added_at_once_none_is_lost(tmp_path: Path) -> None:
    models = tmp_path / "models.yaml"
    models.write_text(OLD)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: add_entry(models, ENTRY.replace("new", f"new{number}", 1)), range(8)))
    assert {model.name for model in load_catalog(models).models} == {"old", *(f"new{number}" for number in range(8))}


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("models: {old: {source: org/old, memory_gib: 1}}\n", "by hand:\n  new:"),
        (OLD + "...\n", "by hand:\n  new:"),
        (OLD + "        aliases: [new]\n", "is taken by model 'old'"),
        ("models:\n\told: {}\n", "not valid YAML in line 2"),
    ],
    ids=["flow", "document end", "taken", "tab"],
)
def test_a_catalog_that_cannot_be_added_to_stays_as_it_is(tmp_path: Path, before: str, words: str) -> None:
    models = tmp_path / "models.yaml"
    models.write_text(before)
    with pytest.raises(ConfigError, match=words):
        add_entry(models, ENTRY)
    assert models.read_text() == before
    assert list(tmp_path.iterdir()) == [models]
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        add_entry(tmp_path / "nowhere" / "models.yaml", ENTRY)


@pytest.mark.parametrize(
    "odd",
    [
        {"architectures": ["X\n  evil:\n    engine: command"]},
        {"torch_dtype": "bfloat16\n  evil:"},
        {"quantization_config": {"quant_method": "fp8\n  evil:"}},
        {"num_experts": "128"},
        {"num_experts": -128},
        {"num_experts": 128, "num_hidden_layers": 10**11},
        {"num_experts": 8, "decoder_sparse_step": [2]},
        {"kv_lora_rank": "512", "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64},
        {"sliding_window": -5},
        {"num_attention_heads": [8, 8]},
        {"num_attention_heads": 0},
        {"vision_config": {"hidden_size": 10, "depth": 2, "intermediate_size": "x"}},
    ],
    ids=str,
)
def test_an_odd_configuration_gets_no_estimate(tmp_path: Path, odd: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(CONFIG), **odd}))
    with pytest.raises(ConfigError, match=r"no estimate: its config\.json"):
        read_source(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "words"),
    [("adapter_config.json", "plan its base"), ("m-Q4.gguf", "GGUF"), ("x.txt", "as Transformers saves it")],
)
def test_a_folder_without_a_configuration_says_what_to_do(tmp_path: Path, file: str, words: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(NotFound, match=words):
        read_source(str(tmp_path))


def test_of_several_gguf_files_none_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    for quantized in ("Q4", "Q8"):
        (tmp_path / f"m-{quantized}.gguf").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match="of GGUF files no memory can be worked out"):
        read_source(str(tmp_path))


def test_a_configuration_that_is_nested_too_deep(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_source(str(tmp_path))


def test_a_comment_of_an_entry_stays_on_its_line(hub: str) -> None:
    source = replace(read_source("org/small"), license="mit\n  evil:\r    engine: command\x85\u2028x")
    fit = fits(source, [Room("gpu", 1, 80 << 30, 0)], Wish())[0]
    text = entry_text("new", source, fit, Wish(), "generate")
    assert [line for line in text.splitlines() if "evil" in line] == [text.splitlines()[1]]
    assert text.splitlines()[1].startswith("    # ")


def test_a_catalog_that_others_can_change_is_added_to_only_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_bytes(CONFIG)
    models = tmp_path / "models.yaml"
    models.write_text(OLD)
    models.chmod(0o666)
    words = ["--state", str(tmp_path / "state"), "models", "add", str(tmp_path), "--site", str(a_site(tmp_path))]
    runner = CliRunner(env={"GATEWAY_URL": ""})
    refused = runner.invoke(cli, words, catch_exceptions=False)
    assert refused.exit_code == 2
    assert "another user's" in refused.output
    assert models.read_text() == OLD
    assert runner.invoke(cli, [*words, "--as", "new", "--models", str(models)], catch_exceptions=False).exit_code == 0


@pytest.mark.parametrize("in_force", ["the same", "another", "none"])
def test_only_the_catalog_that_is_in_force_is_put_in_force_anew(tmp_path: Path, in_force: str) -> None:
    layout = Layout(tmp_path / "state")
    layout.state.mkdir(mode=0o700)
    (tmp_path / "config.json").write_bytes(CONFIG)
    models, other = tmp_path / "models.yaml", tmp_path / "other.yaml"
    models.write_text(OLD)
    other.write_text(OLD.replace("old", "precious"))
    if in_force != "none":
        document = catalog_document(load_catalog(models if in_force == "the same" else other))
        layout.catalog_json.write_text(json.dumps(document))
    words = ("add", str(tmp_path), "--as", "new", "--models", str(models), "--site", str(a_site(tmp_path)))
    for url, told in (("", "the gateway's catalog is another" if in_force == "another" else "no gateway runs"),
                      ("http://127.0.0.1:9", "not in force at http://127.0.0.1:9")):  # fmt: skip
        models.write_text(OLD)
        state = () if url else ("--state", str(layout.state))
        runner = CliRunner(env={"GATEWAY_URL": url, "GATEWAY_STATE": str(layout.state)})
        done = runner.invoke(cli, [*state, "models", *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert told in done.output
