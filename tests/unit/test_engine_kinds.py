"""What an entry may say to each kind of engine."""

from __future__ import annotations

from typing import Any

import pytest

from gateway_plugin.catalog import Model
from gateway_plugin.engine_kinds import KINDS
from gateway_plugin.engine_options import refusal
from gateway_plugin.engine_reserved import RESERVED
from gateway_plugin.errors import ConfigError
from gateway_plugin.weights import resolve


def entry(engine: str, *args: str, **more: Any) -> Model:
    given = {"name": "m", "source": "/w/m", "memory_gib": 4, "engine": engine, "args": list(args), **more}
    return Model.model_validate(given)


def said(engine: str, *args: str, **more: Any) -> str | None:
    found = refusal(entry(engine, *args, **more))
    return None if found is None else ": ".join(found)


TASK = {"whisper": "transcribe"}


@pytest.mark.parametrize("engine", sorted(RESERVED))
@pytest.mark.parametrize("option", ["--host", "--port", "--port=1"])
def test_no_entry_says_where_its_engine_listens(engine: str, option: str) -> None:
    found = said(engine, option, "1", task=TASK.get(engine, "generate"))
    assert found == f"args: {option.partition('=')[0]}: the gateway gives this itself; leave it out"


@pytest.mark.parametrize(
    ("engine", "words", "says"),
    [
        ("sglang", ("--api-key", "x"), "the gateway gives this itself"),
        ("sglang", ("--tp-size", "4"), "say gpus: 4"),
        ("sglang", ("--tp", "4"), "say gpus: 4"),
        ("sglang", ("--mem-fraction-static", "0.8"), "say memory_gib:"),
        ("sglang", ("--model-path", "org/m"), "say source:"),
        ("sglang", ("--is-embedding",), "say task:"),
        ("sglang", ("--ssl_keyfile", "k"), "the gateway gives this itself"),
        ("sglang", ("--disaggregation-mode", "prefill"), "one server"),
        ("llama.cpp", ("-m", "x.gguf"), "say source:"),
        ("llama.cpp", ("--hf-repo", "org/m"), "say source:"),
        ("llama.cpp", ("-a", "other"), "name and aliases"),
        ("llama.cpp", ("--api-key", "x"), "the gateway gives this itself"),
        ("llama.cpp", ("--reranking",), "say task:"),
        ("llama.cpp", ("--tools", "all"), "run programs on the node"),
        ("llama.cpp", ("--hf-token", "x"), "env: {HF_TOKEN: ...}"),
        ("transformers", ("--device", "cuda"), "say gpus:"),
        ("transformers", ("--force-model", "x"), "say source:"),
        ("transformers", ("org/m",), "is no option"),
        ("whisper", ("--uds", "/s"), "the gateway gives this itself"),
        ("whisper", ("--workers", "2"), "one server"),
    ],
)
def test_what_has_a_key_of_its_own_is_refused_with_that_key(engine: str, words: tuple[str, ...], says: str) -> None:
    found = said(engine, *words, task=TASK.get(engine, "generate"))
    assert found is not None
    assert found.startswith(f"args: {words[0]}") or found.startswith(f"args: {words[0]!r}")
    assert says in found


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("sglang", ("--context-length", "8192", "--reasoning-parser", "qwen3")),
        ("llama.cpp", ("--ctx-size", "8192", "-np", "2", "-ngl", "99", "--mmproj", "/w/mm.gguf")),
        ("transformers", ("--continuous-batching", "--dtype", "bfloat16")),
        ("whisper", ("--timeout-keep-alive", "60")),
    ],
)
def test_its_other_options_are_the_entrys(engine: str, words: tuple[str, ...]) -> None:
    assert said(engine, *words, task=TASK.get(engine, "generate")) is None


def test_an_engine_is_given_no_task_that_it_cannot_do() -> None:
    assert said("whisper") == "task: 'engine: whisper' does not serve 'generate'; it serves transcribe"
    assert said("transformers", task="embed") == (
        "task: 'engine: transformers' does not serve 'embed'; it serves generate, transcribe"
    )
    assert said("vllm", task="speak") is not None
    assert said("command", task="speak", command=["x", "{port}"]) is None


@pytest.mark.parametrize(
    ("engine", "args", "expected"),
    [
        ("sglang", (), 0),
        ("sglang", ("--max-running-requests", "64"), 64),
        ("llama.cpp", (), 4),
        ("llama.cpp", ("-np", "8"), 8),
        ("llama.cpp", ("--parallel=2",), 2),
        ("transformers", (), 1),
        ("transformers", ("--continuous-batching",), 0),
        ("whisper", (), 1),
    ],
)
def test_how_many_requests_it_is_sent_at_a_time(engine: str, args: tuple[str, ...], expected: int) -> None:
    assert entry(engine, *args, task=TASK.get(engine, "generate")).requests_at_a_time == expected


def test_which_engines_are_behind_a_doorman() -> None:
    behind = {name for name in KINDS if name != "command" and entry(name).behind_doorman}
    assert behind == {"sglang", "llama.cpp", "transformers", "whisper"}
    plain = entry("command", command=["my-server", "--port", "{port}"])
    assert (plain.behind_doorman, plain.on_socket) == (True, False)
    socket = entry("command", command=["my-server", "--uds", "{socket}"])
    assert (socket.behind_doorman, socket.on_socket) == (True, True)
    assert not entry("command", command=["my-server", "--port", "{port}", "--cert={certfile}"]).behind_doorman


def test_a_command_on_a_socket_serves_no_tls() -> None:
    command = ["my-server", "{socket}", "{certfile}"]
    assert "'{socket}' is for a program that serves no TLS" in str(said("command", command=command))
    assert said("command", command=["my-server", "{socket}"]) is None


def test_another_path_of_health_is_the_doormans() -> None:
    assert entry("command", command=["x", "{port}"], health="/v1/models").health == "/v1/models"
    with pytest.raises(ValueError, match="the edge asks '/health'"):
        entry("vllm", health="/v1/models")
    for wrong in ("health", "/health?x", "/a b", "/x\n  server y 1.2.3.4:1"):
        with pytest.raises(ValueError, match="expected a path such as /health"):
            entry("command", command=["x", "{port}"], health=wrong)


def test_only_who_can_sleep_is_asked_to() -> None:
    with pytest.raises(ValueError, match="'engine: sglang' cannot sleep"):
        entry("sglang", sleep=True, gpus=1)
    assert not entry("sglang", gpus=1).sleeps
    assert entry("command", command=["x", "{port}"], sleep=True, gpus=1).sleeps


def test_llama_cpp_loads_the_one_gguf_file_of_a_folder(tmp_path: Any) -> None:
    def found(source: str) -> str:
        return resolve(entry("llama.cpp", source=source))

    with pytest.raises(ConfigError, match="no GGUF file"):
        found(str(tmp_path))
    for name in ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "mmproj-a.gguf"):
        (tmp_path / name).touch()
    assert found(str(tmp_path)) == str(tmp_path / "a-00001-of-00002.gguf")
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ConfigError, match="2 GGUF files"):
        found(str(tmp_path))
    assert found(str(tmp_path / "b.gguf")) == str(tmp_path / "b.gguf")
    assert found("org/m-GGUF:Q4_K_M") == "org/m-GGUF:Q4_K_M"


def test_llama_cpp_loads_the_one_gguf_file_of_a_fetched_repository(tmp_path: Any) -> None:
    commit = "0" * 40
    folder = tmp_path / "models--org--m-GGUF" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "m-Q4.gguf").write_bytes(b"4")
    assert resolve(entry("llama.cpp", source=f"org/m-GGUF@{commit}"), fetched=tmp_path) == str(folder / "m-Q4.gguf")
