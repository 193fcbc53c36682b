"""models.yaml: what is taken, and one line for what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_plugin.catalog import MODEL_NAME, catalog_document, load_catalog, parse_catalog
from gateway_plugin.catalog_values import parse_duration_s
from gateway_plugin.errors import ConfigError, ModelNotFound

ENTRY = {"source": "org/name", "memory_gib": 2}


def parsed(**entry: Any) -> Any:
    return parse_catalog({"models": {"m": {**ENTRY, **entry}}}, "models.yaml").models[0]


def complaint(document: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_catalog(document, "models.yaml")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_an_entry_with_defaults() -> None:
    model = parsed()
    assert (model.name, model.task, model.engine, model.gpus, model.memory_mib) == ("m", "generate", "vllm", 0, 2048)
    assert model.keep_alive_s == -1
    assert model.hang_after_s == 300
    assert (parsed(hang_after="90s").hang_after_s, parsed(hang_after_s=0).hang_after_s) == (90.0, 0.0)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"sauce": "x"}, "models.yaml: models.m.sauce: unknown key; expected one of adapters, aliases, args"),
        ({"hang_after": -1}, "models.m.hang_after: expected 1 s to 24 h, or 0 for 'never ended', got -1"),
        ({"hang_after": "25h"}, "models.m.hang_after: expected 1 s to 24 h"),
        ({"hang_after": 0.5}, "models.m.hang_after: expected 1 s to 24 h"),
        ({"memory_gib": 0}, "models.m.memory_gib: Input should be greater than 0"),
        ({"memory_gib": None}, "models.m.memory_gib"),
        ({"gpus": -1}, "models.m.gpus"),
        ({"task": "paint"}, "models.m.task: Input should be 'generate', 'embed', 'rerank'"),
        ({"keep_alive": "10 parsecs"}, "models.m.keep_alive: expected a duration such as 90, '10m' or -1"),
        ({"load_timeout": -1}, "'for ever') is not possible here"),
        ({"engine": "command"}, "'command' is given exactly when 'engine: command' is"),
        ({"aliases": ["a;b"]}, "a model name matches"),
        ({"source": "org/name@"}, "models.m.source: a hub source is 'org/name' or 'org/name@REVISION'"),
        ({"source": "org/name@a b"}, "models.m.source: a hub source is"),
        ({"source": "org/name@--trust-remote-code"}, "models.m.source: a hub source is"),
        ({"aliases": ["m"]}, "the name 'm' of model 'm' is taken"),
        ({"aliases": "n"}, "models.m.aliases: expected a list of names: [n]"),
        ({"args": "--dtype auto"}, "models.m.args: expected a list of words: [--dtype, auto]"),
        ({"args": ["--port", 8000]}, "models.m.args: --port: the gateway gives this itself"),
        ({"command": "run it", "engine": "command"}, "models.m.command: expected a list of words: [run, it]"),
        ({"env": {"A": True}}, 'models.m.env: A: expected text, such as "1", got true; write it in quotes'),
        ({"env": ["A=1"]}, "models.m.env: expected a mapping of names to texts"),
        ({"env": {"VLLM_API_KEY": "x"}}, "models.m.env: VLLM_API_KEY: the gateway gives it itself"),
        (
            {"memory_gib": "70GB"},
            "models.m.memory_gib: expected GiB as a number, such as 24 or 2.8, or 'auto', got '70GB'",
        ),
        ({"memory_gib": True}, "models.m.memory_gib: expected a number, got True"),
        ({"gpus": True}, "models.m.gpus: expected a number, got True"),
        ({"replicas_max": True}, "models.m.replicas_max: expected a number, got True"),
        ({"concurrency": 0}, "models.m.concurrency: Input should be greater than or equal to 1"),
        ({"concurrency": "many"}, "models.m.concurrency: Input should be a valid integer"),
        ({"args": ["--lora-modules", "a=/p"]}, "models.m.aliases: the adapter a of --lora-modules"),
        ({"source": "${SCRATCH}/m"}, "models.m.source: '${SCRATCH}/m': no shell fills in variables here"),
        ({"name": "n"}, "models.m.name: unknown key; the name is the entry's own key"),
    ],
)
def test_a_wrong_entry_is_told_with_file_key_and_what_was_expected(entry: dict[str, Any], says: str) -> None:
    assert says in complaint({"models": {"m": {**ENTRY, **entry}}})


@pytest.mark.parametrize("name", [True, None, 7, 1.5])
def test_a_name_that_yaml_made_something_else_of_is_refused(name: object) -> None:
    assert f"models: {name!r}: a model's name is text" in complaint({"models": {name: ENTRY}})


@pytest.mark.parametrize("document", [None, [], {}, {"models": []}, {"models": {"m": 3}}, {"models": {}, "x": 1}])
def test_a_document_of_another_shape_is_refused(document: object) -> None:
    assert complaint(document).startswith("models.yaml: ")


def test_a_misspelt_key_is_named_before_the_one_that_is_missing_for_it() -> None:
    assert "models.m.sauce" in complaint({"models": {"m": {"sauce": "org/name", "memory_gib": 1}}})


@pytest.mark.parametrize("name", ["01-ai/Yi-34B", "4bit", "model+v2", "org/4x7B", "123/4b:q4_K_M"])
def test_names_as_the_hub_has_them(name: str) -> None:
    assert parse_catalog({"models": {name: ENTRY}}, "x").find(name).name == name


@pytest.mark.parametrize("name", ["5", "5.0", "+x", "-x", ".x", "/x", "a;b", "a b", "a\n", "a\0", "x" * 129, ""])
def test_what_is_no_name(name: str) -> None:
    """A number is what ``"model": 5`` looks like to the edge; what begins with a sign, like an option to an engine."""
    assert not MODEL_NAME.fullmatch(name)


def test_models_are_found_by_name_and_alias() -> None:
    catalog = parse_catalog({"models": {"m": {**ENTRY, "aliases": ["n"]}}}, "x")
    assert catalog.find("m") is catalog.find("n")
    with pytest.raises(ModelNotFound, match="Known models: m"):
        catalog.find("o")


def test_a_catalog_survives_being_written_as_json() -> None:
    catalog = parse_catalog({"models": {"m": {**ENTRY, "keep_alive": "1h30m", "env": {"A": "b"}, "pinned": True}}}, "x")
    assert parse_catalog(catalog_document(catalog), "y") == catalog


def test_what_an_earlier_version_took_stays_in_force() -> None:
    """A controller that restarts after an upgrade, and the masks of ``gateway logs``, need the entries as they are."""
    document = {"models": {"m": {**ENTRY, "args": ["--port", "8000"], "env": {"A_TOKEN": "a-secret"}}}}
    assert "--port" in complaint(document)
    assert parse_catalog(document, "catalog.json", in_force=True).models[0].args == ("--port", "8000")


def test_numbers_are_taken_as_text() -> None:
    model = parsed(args=["--max-model-len", 32768, "--cpu-offload-gb", 0.5], env={"A": 1})
    assert model.args == ("--max-model-len", "32768", "--cpu-offload-gb", "0.5")
    assert model.env == {"A": "1"}


@pytest.mark.parametrize(
    ("text", "twice"),
    [
        ("models:\n  a: {source: x, memory_gib: 1}\n  a: {source: y, memory_gib: 2}", "line 3: 'a' is there twice"),
        ("models:\n  a: {source: x, gpus: 1, memory_gib: 1, gpus: 2}", "line 2: 'gpus' is there twice"),
        ("models:\n  a: {source: x, memory_gib: 1, env: {A: b, A: c}}", "line 2: 'A' is there twice"),
        ("models: {}\nmodels: {}", "line 2: 'models' is there twice, first in line 1"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, text: str, twice: str) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=twice):
        load_catalog(file)


def test_words_stay_as_they_are_written(tmp_path: Path) -> None:
    """YAML would make 8 of 010, 1.1 of 1.10, 45045 of 12:30:45 and true of on."""
    written = ["010", "1.10", "1_000", "12:30:45", "0x10", "1e3", "2024-01-01", "on", "No"]
    file = tmp_path / "models.yaml"
    file.write_text(
        f"models:\n  yes: {{source: x/y, memory_gib: 2.50, gpus: 2, pinned: yes, keep_alive: 90, isolated: false,\n"
        f"    args: [--x, {', '.join(written)}], env: {{A: 0.10}}, aliases: [on, v1.10]}}\n"
    )
    model = load_catalog(file).models[0]
    assert (model.name, model.aliases) == ("yes", ("on", "v1.10"))
    assert list(model.args[1:]) == written
    assert model.env == {"A": "0.10"}
    assert (model.memory_gib, model.gpus, model.pinned, model.keep_alive_s) == (2.5, 2, True, 90.0)
    assert not model.isolated


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("models:\n  [a, b]: {source: x, memory_gib: 1}", "is not valid YAML in line 2"),
        ("models:\n  a: {source: x, memory_gib: 1" + "0" * 5000 + "}", "models.a.memory_gib: Input should be less"),
        ("models: " + "[" * 5000 + "]" * 5000, "is nested too deep"),
        ("models:\n  true: {source: x, memory_gib: 1}", "models: True: a model's name is text; write it in quotes"),
    ],
)
def test_odd_documents_are_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_catalog(file)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_entries_may_share_keys_and_say_some_anew(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(
        "models:\n  a: &a {source: x, memory_gib: 1}\n  b: &b {<<: *a, source: y}\n  c: {<<: *b, source: z}\n"
    )
    assert [model.source for model in load_catalog(file).models] == ["x", "y", "z"]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_catalog(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("models:\n  m: {source: [")
    with pytest.raises(ConfigError, match="is not valid YAML in line"):
        load_catalog(broken)


@pytest.mark.parametrize(
    ("text", "seconds"), [(90, 90.0), ("90", 90.0), ("10m", 600.0), ("1h30m", 5400.0), ("250ms", 0.25), (-1, -1.0)]
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "10 m 3", "-5", -2, True, None, "inf", "nan", [1]])
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration_s(text)


@given(st.text(max_size=140))
def test_a_name_that_is_taken_cannot_break_out_of_a_map_or_a_socket_command(name: str) -> None:
    if MODEL_NAME.fullmatch(name):
        assert not set(name) & set("; \t\n\r\"'\\<>#%$`")
        assert name.isascii()


@pytest.mark.parametrize(
    ("entry", "at_a_time"),
    [
        ({}, 128),
        ({"gpus": 1}, 256),
        ({"gpus": 1, "args": ["--max-num-seqs", "64"]}, 64),
        ({"gpus": 1, "args": ["--max_num_seqs=32"]}, 32),
        ({"gpus": 1, "args": ["--max-num-seqs", "32", "--max-num-seqs", "48"]}, 48),
        ({"gpus": 1, "args": ["--max-num-seqs", "99999"]}, 10_000),
        ({"gpus": 1, "args": ["--max-num-seqs", "9" * 5000]}, 256),
        ({"gpus": 1, "args": ["--max-num-seqs", "0"]}, 256),
        ({"gpus": 1, "args": ["--max-num-seqs"]}, 256),
        ({"gpus": 1, "args": ["--max-num-seq=8"]}, 8),
        ({"gpus": 1, "args": ["--max-num-active-seqs", "8"]}, 8),
        ({"gpus": 1, "args": ["--max-num-active-seqs", "64", "--max-num-seqs", "32"]}, 32),
        ({"gpus": 1, "args": ["--max-num-seqs", "64"], "concurrency": "8"}, 8),
        ({"engine": "command", "command": ["server", "{port}"]}, 0),
        ({"engine": "command", "command": ["vllm", "serve", "--max-num-seqs", "16", "--port", "{port}"]}, 16),
        ({"engine": "command", "command": ["server", "{port}"], "concurrency": 2}, 2),
    ],
    ids=str,
)
def test_requests_at_a_time(entry: dict[str, object], at_a_time: int) -> None:
    (model,) = parse_catalog({"models": {"m": {"source": "x", "memory_gib": 1, **entry}}}, "f").models
    assert model.requests_at_a_time == at_a_time


def test_an_entry_is_given_its_runtime_by_name_and_written_so_again() -> None:
    runtimes = {"new": {"python": "/sw/vllm/bin/python", "modules": ["cuda/12.8"]}}
    document = {"models": {"m": {**ENTRY, "runtime": "new"}}, "runtimes": runtimes}
    catalog = parse_catalog(document, "models.yaml")
    runtime = catalog.find("m").runtime
    assert runtime is not None
    assert (runtime.name, runtime.python, runtime.modules) == ("new", "/sw/vllm/bin/python", ("cuda/12.8",))
    written = catalog_document(catalog)
    assert (written["models"]["m"]["runtime"], written["runtimes"]) == ("new", runtimes)
    assert parse_catalog(json.loads(json.dumps(written)), "again") == catalog


@pytest.mark.parametrize(
    ("runtimes", "says"),
    [
        ({}, "models.m.runtime: no runtime 'new'; known: there are none"),
        ({"old": {}}, "models.m.runtime: no runtime 'new'; known: old"),
        ({"new": {"pyhton": "/x"}}, "runtimes.new.pyhton: unknown key; expected one of container, env"),
        ({"new": {"container": {"kind": "docker", "image": "x"}}}, "runtimes.new.container.kind: Input should be"),
        ({"new": {"container": {"kind": "podman", "image": "", "bind": []}}}, "expected one of args, binds, image"),
        ({"new": []}, "runtimes.new: expected a mapping"),
        ({"new": {"python": "env/bin/python"}}, "runtimes.new.python: expected the interpreter's full path"),
        ({"new": {"python": "$HOME/env/bin/python"}}, "runtimes.new.python: "),
        ({"new": {"modules": ["--force"]}}, "runtimes.new.modules: expected one name for each item, got '--force'"),
        ({"new": {"modules": ["cuda vllm"]}}, "runtimes.new.modules: expected one name for each item"),
        ({"new": {"env": {"VLLM_API_KEY": "x"}}}, "runtimes.new.env: VLLM_API_KEY: the gateway gives it itself"),
        ({"../new": {"python": "/x"}, "new": {}}, "runtimes.../new.name: a runtime's name is letters, digits"),
        (
            {"new": {"container": {"kind": "podman", "image": "--privileged"}}},
            "runtimes.new.container.image: expected a full path, or a name",
        ),
        (
            {"new": {"container": {"kind": "apptainer", "image": "docker://vllm/vllm-openai"}}},
            "runtimes.new.container.image: fetch it before ('apptainer pull'",
        ),
        (
            {"new": {"container": {"kind": "podman", "image": "x", "binds": ["data:/data"]}}},
            "runtimes.new.container.binds: expected /PATH, or /PATH:/PATH_INSIDE, got 'data:/data'",
        ),
        ([], "runtimes: expected a mapping"),
    ],
)  # fmt: skip
def test_a_wrong_runtime_is_told_by_its_key(runtimes: Any, says: str) -> None:
    assert says in complaint({"models": {"m": {**ENTRY, "runtime": "new"}}, "runtimes": runtimes})
