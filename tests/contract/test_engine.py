"""What every engine must do for its node agent, the fake one and vLLM alike.

An engine starts once a module and a row of ``ROWS``; the tests use it in the order in which they stand, the last one
ends it: one row by a command, the other with ``kill -9`` of its leader.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
import pytest

from gateway_plugin.catalog import Model, load_catalog
from gateway_plugin.engine_records import engine_folder
from gateway_plugin.isolation import find_isolation
from gateway_plugin.paths import Layout
from gateway_plugin.processes import alive, group_members
from gateway_plugin.sizing.auto import sized
from gateway_plugin.sizing.source import read_source
from gateway_plugin.weights import prepare
from serve.agent import records
from serve.agent.host_memory import taken_mib
from serve.agent.progress import Counters, counters_of
from serve.agent.records import EngineRecord
from serve.agent.timing import Timing
from serve.core.events import EngineExited, EngineListening, EngineReady
from tests.support.agents import (
    KEY,
    NAMED,
    QUICK,
    AgentHost,
    engine_client,
    eventually,
    fake_model,
    plain_model,
    private_layout,
)
from tests.support.images import charliecloud, missing
from tests.support.whisper import is_heard, speech, whisper_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "models.yaml"

PATHS = (
    *("/health", "/ping", "/version", "/metrics", "/load", "/docs", "/openapi.json", "/v1/models", "/tokenizer_info"),
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/score"),
    *(
        "/invocations",
        "/inference/v1/generate",
        "/pooling",
        "/classify",
        "/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
    ),
    *("/tokenize", "/detokenize", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/audio/transcriptions"),
    *(
        "/sleep",
        "/wake_up",
        "/is_sleeping",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/server_info",
    ),
    *(
        "/update_weights",
        "/start_profile",
        "/stop_profile",
        "/scale_elastic_ep",
        "/is_scaling_elastic_ep",
        "/abort_requests",
    ),
    *("/pause", "/resume", "/", "/no-such-path"),
)


@dataclass(frozen=True)
class Row:
    """One engine to be tested, and how it ends."""

    kind: str
    task: str
    end: str
    isolate: Literal["auto", "off"] = "auto"
    container: bool = False

    @property
    def load_timeout_s(self) -> float:
        return 15.0 if self.quick else 240.0

    @property
    def quick(self) -> bool:
        """It is the fake engine."""
        return self.kind in ("fake", "port", "socket")

    def model(self) -> Model:
        options = ("--children", "2", "--load-delay-s", "0.2", "--metrics")
        if self.kind == "fake":
            return fake_model("tiny", self.task, *options)
        if self.quick:
            return plain_model("tiny", self.task, *options, socket=self.kind == "socket")
        if self.kind == "whisper":
            return whisper_model()
        name = {"generate": "smollm2", "embed": "minilm"}[self.task]
        model = load_catalog(EXAMPLE).find(name)
        prepare([model.source.removeprefix("prepared:")])
        if self.kind == "transformers":
            return model.model_copy(update={"engine": "transformers", "args": ()})
        return model

    def broken_model(self) -> Model:
        """One that ends while it starts."""
        if self.quick:
            made = fake_model if self.kind == "fake" else plain_model
            return made("tiny", self.task, "--crash-on-start")
        return self.model().model_copy(update={"args": ("--max-model-len", "99999999")})


ROWS = [
    pytest.param(Row("fake", "generate", "stop"), id="fake-generate"),
    pytest.param(Row("fake", "embed", "kill"), id="fake-embed"),
    pytest.param(Row("fake", "generate", "kill", "off"), id="fake-not-isolated"),
    pytest.param(Row("port", "generate", "stop"), id="doorman-port"),
    pytest.param(Row("socket", "embed", "kill"), id="doorman-socket"),
    pytest.param(Row("socket", "generate", "doorman", "off"), id="doorman-not-isolated"),
    pytest.param(Row("transformers", "generate", "stop"), id="transformers", marks=pytest.mark.live),
    pytest.param(Row("whisper", "transcribe", "doorman"), id="whisper", marks=pytest.mark.live),
    pytest.param(
        Row("fake", "generate", "stop", container=True),
        id="fake-in-a-container",
        marks=pytest.mark.skipif(bool(missing()), reason=f"no container: {missing()}"),
    ),
    pytest.param(Row("vllm", "generate", "stop"), id="vllm-generate", marks=pytest.mark.live),
    pytest.param(Row("vllm", "embed", "kill"), id="vllm-embed", marks=pytest.mark.live),
]


@dataclass
class Running:
    """An engine that is ready."""

    row: Row
    host: AgentHost
    model: Model
    record: EngineRecord
    order: tuple[str, ...]

    @property
    def layout(self) -> Layout:
        return self.host.layout

    def client(self, key: str = KEY, context: ssl.SSLContext | None = None) -> httpx.Client:
        return engine_client(self.layout, self.record.address, key, context)


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with private_layout() as made:
        yield made


@pytest.fixture(scope="module", params=ROWS)
def engine(
    request: pytest.FixtureRequest, layout: Layout, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    row: Row = request.param
    place = tmp_path_factory.mktemp("runtime")
    set_here = pytest.MonkeyPatch()
    if row.container:
        set_here.setenv("XDG_CACHE_HOME", str(place / "cache"))  # its home; real engines' weights stay where they are
    host = AgentHost(layout, timing=QUICK if row.quick else Timing(), isolate=row.isolate)
    try:
        model = row.model()
        if row.container:
            model = model.model_copy(update={"runtime": charliecloud(place / "image")})
        begun = time.monotonic()
        host.start(model)
        assert time.monotonic() - begun < 10, "start must return at once: a vLLM takes longer to load"
        listening = host.wait(EngineListening, timeout_s=row.load_timeout_s)
        ready = host.wait(EngineReady, timeout_s=row.load_timeout_s)
        assert ready.used_mib > 0
        print(f"{row}: ready after {ready.load_s:.1f} s")
        assert listening.address == ready.address
        assert 0 < ready.load_s <= time.monotonic() - begun + 2.5  # the wall clock's start is rounded
        yield Running(row, host, model, host.record(), (listening.address, ready.address))
    finally:
        set_here.undo()
        host.close()


def test_keeps_its_key_and_log_to_itself(engine: Running) -> None:
    group = [psutil.Process(known.pid) for known in group_members(engine.record.mark)]
    assert len(group) >= 2, "the test wants an engine with children"
    assert all(KEY not in word for process in group for word in process.cmdline())
    if engine.model.behind_doorman:  # the doorman has a hash of it, the engine nothing
        assert all(KEY not in value for process in group for value in process.environ().values())
    log = Path(engine.record.log)
    record = records.record_path(engine.layout, engine.record.engine)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (log, record)} == {0o600}
    assert KEY not in log.read_text()


def test_sees_nothing_of_the_gateway_but_its_three_files(engine: Running) -> None:
    if engine.row.isolate == "off":
        pytest.skip("it is not isolated")
    if not engine.row.container and (reason := find_isolation(engine.layout).reason):
        pytest.skip(f"no bubblewrap: {reason}")
    layout = engine.layout
    needed = {layout.ca, layout.engine_certificate, layout.engine_key}
    for pid in (known.pid for known in group_members(engine.record.mark)):
        seen = Path(f"/proc/{pid}/root") / str(layout.state).lstrip("/")
        assert {layout.state / path.relative_to(seen) for path in seen.rglob("*") if path.is_file()} == needed
        run = seen.parent / layout.run.name
        own = run / engine_folder(records.record_path(layout, engine.record.engine)).relative_to(layout.run)
        assert [path for path in run.rglob("*") if not path.is_dir() and own not in path.parents] == []


def test_answers_over_mutual_tls_with_its_key(engine: Running) -> None:
    with engine.client() as client:
        assert client.get("/health", extensions=NAMED).status_code == 200
        if engine.row.kind not in ("transformers", "whisper"):  # the one lists what its cache holds, the other nothing
            cards = client.get("/v1/models", extensions=NAMED).json()["data"]
            assert {card["id"] for card in cards} == set(engine.model.names)
        for name in engine.model.names:
            said = ask(client, engine.row.task, name)
            assert said, name
    if engine.row.kind == "whisper":
        assert is_heard(said), said
    if engine.row.kind in ("vllm", "transformers") and engine.row.task == "generate":
        assert "Paris" in said


def test_counts_its_work_in_words_that_its_agent_knows(engine: Running) -> None:
    if engine.row.kind in ("transformers", "whisper"):
        pytest.skip("it has no metrics")
    with engine.client() as client:

        def counted() -> Counters:
            found = counters_of(client.get("/metrics", extensions=NAMED).text)
            assert found is not None
            return found

        # vLLM sets its counters after the step whose answer it has sent.
        assert eventually(lambda: counted().in_flight == 0)
        before = counted()
        ask(client, engine.row.task, engine.model.name)
        assert eventually(lambda: (now := counted()).in_flight == 0 and now.progress != before.progress)


def test_embeddings_mean_something(engine: Running) -> None:
    if (engine.row.kind, engine.row.task) != ("vllm", "embed"):
        pytest.skip("only a real embedding model knows")
    texts = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose in March."]
    with engine.client() as client:
        body = {"model": engine.model.name, "input": texts}
        data = client.post("/v1/embeddings", json=body, extensions=NAMED).json()["data"]
    cat, kitten, rates = (item["embedding"] for item in data)
    assert len(cat) == 384
    assert dot(cat, kitten) > 0.5 > 0.3 > dot(cat, rates)


def test_its_memory_is_as_it_was_worked_out(engine: Running) -> None:
    """Not too small; too large as far as engines of other tests share the pages of its libraries meanwhile."""
    if engine.row.kind != "vllm":
        pytest.skip("of other engines it is not worked out")
    planned = sized(engine.model, read_source(engine.model.source), ()).engine.total / 2**30
    many = {"input": ["word " * 200] * 64} if engine.row.task == "embed" else {"prompt": ["word " * 1500] * 6}
    path = "/v1/embeddings" if engine.row.task == "embed" else "/v1/completions"
    with engine.client() as client:
        body = {"model": engine.model.name, **many}
        assert client.post(path, json=body, extensions=NAMED, timeout=300).status_code == 200
    held = taken_mib(engine.record.mark) / 1024
    print(f"{engine.row}: planned with {planned:.2f} GiB, holds {held:.2f}")
    assert 0.85 < planned / held < 1.4


def test_refuses_everybody_without_the_gateways_certificate(engine: Running) -> None:
    """Its key guards only some paths; TLS guards all of them, before a byte of HTTP is read."""
    layout = engine.layout
    nobody = ssl.create_default_context(cafile=str(layout.ca))
    server = ssl.create_default_context(cafile=str(layout.ca))
    server.load_cert_chain(str(layout.engine_certificate), str(layout.engine_key))  # stolen from a node: opens nothing
    with private_layout() as other:
        stranger = ssl.create_default_context(cafile=str(layout.ca))
        stranger.load_cert_chain(str(other.agent_identity))
    for who, context in {"nobody": nobody, "an engine": server, "another gateway": stranger}.items():
        for path in PATHS:
            for method in ("GET", "POST"):
                with engine.client(context=context) as client, pytest.raises(httpx.TransportError):
                    answer = client.request(method, path, extensions=NAMED)
                    pytest.fail(f"{who}: {method} {path} was answered {answer.status_code}")


def test_nobody_goes_round_its_doorman(engine: Running) -> None:
    if not engine.model.behind_doorman:
        pytest.skip("it has none")
    if engine.model.on_socket:
        folder = engine_folder(records.record_path(engine.layout, engine.record.engine))
        assert [path.name for path in folder.iterdir() if path.is_socket()] == ["e.sock"]
        assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)} == {0o700}
        return
    if not find_isolation(engine.layout).network:
        pytest.skip("its port is on the node's own loopback")
    words = psutil.Process(engine.record.pid).cmdline()
    port = int(words[words.index("--port") + 1])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_its_temporary_files_lie_in_its_own_folder(engine: Running) -> None:
    if engine.row.container:
        pytest.skip("a container has a /tmp of its own")
    folder = engine_folder(records.record_path(engine.layout, engine.record.engine))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    if engine.row.kind == "vllm":  # its process title overwrites its environment
        assert list(folder.glob("vllm_dist_*"))
        return
    environment = psutil.Process(engine.record.pid).environ()
    assert (environment["TMPDIR"], environment["VLLM_RPC_BASE_PATH"]) == (str(folder), str(folder))


def test_refuses_plain_http(engine: Running) -> None:
    for path in PATHS:
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://{engine.record.address}{path}", timeout=10, trust_env=False)


def test_refuses_a_wrong_key(engine: Running) -> None:
    path, sent = request_of(engine.row.task, engine.model.name)
    for key in ("", "wrong", KEY[:-1], KEY + "0"):
        with engine.client(key) as client:
            assert client.get("/v1/models", extensions=NAMED).status_code == 401
            assert client.post(path, **sent, extensions=NAMED).status_code == 401


def test_is_adopted_by_the_next_agent(engine: Running) -> None:
    engine.host.crash()
    (found,) = engine.host.describe().engines
    assert found.ready
    assert found.address == engine.record.address
    assert found.loaded_s == engine.record.loaded_s
    assert engine.host.wait(EngineReady).load_s == engine.record.loaded_s
    again = engine.host.record()
    assert again.mark == engine.record.mark


def test_its_end_leaves_nothing(engine: Running) -> None:
    members = list(group_members(engine.record.mark))
    assert len(members) >= 2
    begun = time.monotonic()
    if engine.row.end == "stop":
        engine.host.stop(reason="evicted")
    elif engine.row.end == "kill":
        os.kill(engine.record.pid, signal.SIGKILL)
    else:
        (doorman,) = doormen(engine.record)
        doorman.kill()
    exited = engine.host.wait(EngineExited, timeout_s=30)
    print(f"{engine.row}: gone after {time.monotonic() - begun:.1f} s: {exited.reason}")
    # At the very moment when it is reported, not a while later: its memory is given to another.
    assert group_members(engine.record.mark) == ()
    assert not any(alive(member) for member in members)
    assert exited.expected == (engine.row.end == "stop")
    assert not engine_folder(records.record_path(engine.layout, engine.record.engine)).exists()
    if engine.row.end == "doorman":
        assert "doorman: fatal: HAProxy ended with exit code 137" in exited.reason
    if engine.row.end == "stop":
        assert exited.reason == "evicted"
    assert engine.host.describe().engines == ()
    assert not records.record_path(engine.layout, engine.record.engine).exists()


@pytest.mark.parametrize("row", [row for row in ROWS if row.id in ("fake-generate", "doorman-port", "vllm-generate")])
def test_one_that_fails_to_start_leaves_its_last_words(row: Row, layout: Layout) -> None:
    host = AgentHost(layout)
    try:
        host.start(row.broken_model(), engine="broken")
        exited = host.wait(EngineExited, engine="broken", timeout_s=row.load_timeout_s)
    finally:
        host.close()
    assert not exited.expected
    assert "exit code" in exited.reason
    wanted = "asked to crash on start" if row.quick else "max_model_len"
    assert wanted in exited.reason
    assert len(exited.reason) < 700
    assert KEY not in exited.reason


def request_of(task: str, model: str) -> tuple[str, dict[str, Any]]:
    if task == "embed":
        return "/v1/embeddings", {"json": {"model": model, "input": ["hello"]}}
    if task == "transcribe":
        return "/v1/audio/transcriptions", {"data": {"model": model}, "files": {"file": ("a.wav", speech())}}
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": model, "messages": [question], "max_tokens": 16, "temperature": 0}
    return "/v1/chat/completions", {"json": body}


def doormen(record: EngineRecord) -> list[psutil.Process]:
    """The HAProxy processes in an engine's group."""
    group = (psutil.Process(known.pid) for known in group_members(record.mark))
    return [process for process in group if process.name() == "haproxy"]


def ask(client: httpx.Client, task: str, model: str) -> str:
    path, sent = request_of(task, model)
    answer = client.post(path, **sent, extensions=NAMED)
    assert answer.status_code == 200, answer.text
    if task == "transcribe":
        return str(answer.json()["text"])
    if task == "embed":
        return json.dumps(answer.json()["data"][0]["embedding"])
    return str(answer.json()["choices"][0]["message"]["content"])


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
