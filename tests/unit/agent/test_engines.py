"""The command lines of engines other than vLLM, and what is asked of each."""

from __future__ import annotations

import io
import json
import sys
import wave
from pathlib import Path
from typing import Any

import pytest

from gateway_plugin.catalog import Model
from gateway_plugin.engine_kinds import TASKS, Task
from gateway_plugin.runtimes import Runtime
from serve.agent.argv import Bind, TlsFiles, engine_argv, engine_env
from serve.agent.engines.named import Named, renamed
from serve.agent.probe_requests import answered, tone, trials

TLS = TlsFiles(Path("/t/engine.key"), Path("/t/engine.crt"), Path("/t/ca.pem"))
LOOPBACK = Bind("127.0.0.1", 40123)
SOCKET = Bind("127.0.0.1", 0, "/run/doors/e.sock")


def argv(engine: str, bind: Bind, source: str = "/w/m", gpu_total_mib: int = 0, /, **fields: Any) -> tuple[str, ...]:
    given = {"name": "m", "source": source, "memory_gib": 40, "aliases": ("a",), "engine": engine, **fields}
    return engine_argv(Model.model_validate(given), source, bind, TLS, gpu_total_mib)


def test_sglang() -> None:
    words = argv("sglang", LOOPBACK, "org/m@abc", 81920, gpus=2, args=("--x", "1"))
    assert words == (
        *(sys.executable, "-m", "sglang.launch_server", "--model-path", "org/m", "--revision", "abc"),
        *("--served-model-name", "m", "--host", "127.0.0.1", "--port", "40123", "--enable-metrics"),
        *("--tp-size", "2", "--mem-fraction-static", "0.450", "--x", "1"),
    )
    assert "--is-embedding" in argv("sglang", LOOPBACK, task="rerank")
    assert argv("sglang", LOOPBACK)[-2:] == ("--device", "cpu")


def test_llama_cpp() -> None:
    words = argv("llama.cpp", SOCKET, "/w/m.gguf", gpus=1, args=("-c", "4096"))
    assert words == (
        *("llama-server", "--model", "/w/m.gguf", "--alias", "m,a", "--host", "/run/doors/e.sock"),
        *("--metrics", "--no-webui", "-c", "4096"),
    )
    assert argv("llama.cpp", SOCKET, "org/m:Q4_K_M")[1:3] == ("--hf-repo", "org/m:Q4_K_M")
    assert "--reranking" in argv("llama.cpp", SOCKET, task="rerank")
    assert argv("llama.cpp", SOCKET)[-2:] == ("--n-gpu-layers", "0")


def test_transformers_serves_a_folder_by_a_name_without_special_signs() -> None:
    words = argv("transformers", SOCKET, name="org/m@x:1", args=("--dtype", "bfloat16"))
    assert words[:2] == (sys.executable, "-c")
    assert words[3:] == (
        *("/run/doors/e.sock", "org-m-x-1", "/w/m", "transformers.cli.transformers", "serve", "org-m-x-1"),
        *("--device", "cpu", "--dtype", "bfloat16"),
    )
    assert argv("transformers", SOCKET, "org/m@abc", gpus=1)[3:] == (
        *("/run/doors/e.sock", "org/m@abc", "-", "transformers.cli.transformers", "serve", "org/m@abc"),
        *("--device", "auto"),
    )


def test_whisper() -> None:
    runtime = Runtime(name="w", python="/sw/whisper/bin/python")
    words = argv("whisper", SOCKET, task="transcribe", runtime=runtime)
    assert words == (
        *("env", "FWS_MODEL_NAME=/w/m", "/sw/whisper/bin/python", "-m", "uvicorn", "faster_whisper_server.api:app"),
        *("--uds", "/run/doors/e.sock", "--no-access-log"),
    )


def test_a_command_is_given_a_socket() -> None:
    assert argv("command", SOCKET, command=("run", "--uds={socket}")) == ("run", "--uds=/run/doors/e.sock")


def test_an_engine_behind_a_doorman_has_no_key() -> None:
    for engine, there in (("vllm", True), ("llama.cpp", False), ("transformers", False)):
        model = Model.model_validate({"name": "m", "source": "/w/m", "memory_gib": 4, "engine": engine})
        assert ("VLLM_API_KEY" in engine_env(model, "k", (), (), {})) == there


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_requests_under_the_models_name(task: Task) -> None:
    found = trials("org/m", task)
    assert all(trial.body["model"] == "org/m" for trial in found)
    assert bool(found) == (task != "image")


def test_what_counts_as_an_answer() -> None:
    def takes(task: Task, body: object, status: int = 200) -> bool:
        return answered(task, status, json.dumps(body).encode())

    assert takes("generate", {"choices": [{"text": ""}]})
    assert not takes("generate", {"choices": []})
    assert not takes("generate", {"choices": [{}]}, 500)
    assert takes("embed", {"data": [{"embedding": [0.1]}]})
    assert takes("rerank", {"results": [{"index": 0, "relevance_score": 0.1}]})
    assert takes("rerank", [{"index": 0, "score": 0.1}])
    assert not takes("rerank", {"results": []})
    assert takes("transcribe", {"text": ""})
    assert not takes("transcribe", {"error": "x"})
    assert answered("speak", 200, b"RIFF")
    assert not answered("speak", 200, b"")
    assert answered("speak", 400, b"unknown voice")
    assert not answered("speak", 404, b"")
    assert not answered("transcribe", 200, b"[" * 100_000)


def test_the_tone_is_a_wav_of_a_second() -> None:
    with wave.open(io.BytesIO(tone())) as read:
        assert (read.getnchannels(), read.getframerate(), read.getnframes()) == (1, 16000, 16000)
        assert any(read.readframes(100))


def test_requests_are_renamed_and_nothing_else_is_changed() -> None:
    asked = {"messages": [{"content": '"model": "x"'}], "model": "a", "n": 1}
    assert json.loads(renamed(json.dumps(asked).encode(), False, "m")) == {**asked, "model": "m"}
    for kept in (b"", b"[1]", b"{", b'{"n": 1}', b"[" * 100_000):
        assert renamed(kept, False, "m") == kept
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n'
        b'--b\r\nContent-Disposition: form-data; name="model"\r\nContent-Type: text/plain\r\n\r\nwhisper-1\r\n--b--\r\n'
    )
    assert renamed(form, True, "m") == form.replace(b"whisper-1", b"m")
    assert renamed(b"no form", True, "m") == b"no form"


async def test_a_request_in_pieces_is_renamed_whole() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, _: Any) -> None:
        seen.append((dict(scope["headers"]), await receive(), await receive()))

    pieces = iter(
        (
            {"type": "http.request", "body": b'{"model"', "more_body": True},
            {"type": "http.request", "body": b': "a"}', "more_body": False},
            {"type": "http.disconnect"},
        )
    )

    async def receive() -> Any:
        return next(pieces)

    scope = {"type": "http", "method": "POST", "headers": [(b"content-length", b"14"), (b"x", b"y")]}
    await Named(app, "mm")(scope, receive, None)
    ((headers, whole, after),) = seen
    assert headers == {b"x": b"y", b"content-length": b"15"}
    assert json.loads(whole["body"]) == {"model": "mm"}
    assert after["type"] == "http.disconnect"
