"""The Parsl apps, run by Parsl: on threads, and in worker processes. A small HTTP server stands for the edge."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import parsl
import pytest
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.executors.threads import ThreadPoolExecutor
from parsl.providers import LocalProvider

from gateway_plugin import apps, client
from gateway_plugin.errors import ConfigError, GatewayUnreachable, ModelNotFound, NothingSaid
from gateway_plugin.globus import GlobusClient
from gateway_plugin.http_channel import HttpChannel
from tests.support.fake_endpoint import FakeTransport
from tests.support.owner_doors import owner_door

KEY = "the-key-of-this-test"


class Echo(BaseHTTPRequestHandler):
    """A chat: its last message in capitals. An embedding: the text's length. The model 'nobody': not found."""

    protocol_version = "HTTP/1.1"
    seen: list[dict[str, Any]]
    at_once: list[int]
    counting = threading.Lock()
    company: threading.Barrier | None = None
    """As many chats as this wait for each other."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
        if body["model"] == "nobody":
            return self._send(404, ModelNotFound("nobody").body())
        if self.path == "/v1/embeddings":
            data = [
                {"object": "embedding", "index": i, "embedding": [float(len(t))]} for i, t in enumerate(body["input"])
            ]
            return self._send(200, {"object": "list", "model": "m", "data": data[::-1], "usage": {}})
        with self.counting:
            self.at_once[0] += 1
            self.at_once[1] = max(self.at_once)
        if self.company is not None:
            self.company.wait()
        with self.counting:
            self.at_once[0] -= 1
        text = body["messages"][-1]["content"].upper()
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        if text == "THINK":
            choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "reasoning": "Hm"}}
        return self._send(
            200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        )

    def _send(self, status: int, document: Any) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Echo]]:
    """The stand-in, found the way a gateway of this machine is: by its state folder."""
    handler = type("ThisEcho", (Echo,), {"seen": [], "at_once": [0, 0]})
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    monkeypatch.setenv("GATEWAY_STATE", str(tmp_path))
    monkeypatch.delenv("GATEWAY_URL", raising=False)
    monkeypatch.delenv("GATEWAY_API_KEY", raising=False)
    with owner_door(tmp_path, handler, KEY):
        yield handler
        apps._client(apps.Place()).close()
    apps._connected.cache_clear()


@pytest.fixture
def on_threads(tmp_path: Path) -> Iterator[None]:
    with parsl.load(
        Config(
            [ThreadPoolExecutor(max_threads=2)],
            run_dir=str(tmp_path / "runinfo"),
            usage_tracking=0,
            initialize_logging=False,
        )
    ):
        yield
    parsl.clear()


@pytest.mark.usefixtures("on_threads", "gateway")
def test_an_answer_that_went_into_thinking_is_an_error_not_an_empty_text() -> None:
    with pytest.raises(NothingSaid, match="max_tokens while the model was thinking"):
        apps.chat("think", "m", max_tokens=7).result()
    first, second = apps.map_chat(["think", "a"], "m", return_errors=True).result()
    assert isinstance(first, NothingSaid)
    assert second == "A"


@pytest.mark.usefixtures("on_threads")
def test_chat_answers_with_text_and_passes_its_options_on(gateway: type[Echo]) -> None:
    assert apps.chat("hello", "m", system="Be brief.", temperature=0, max_tokens=7).result() == "HELLO"
    (seen,) = gateway.seen
    assert seen["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert (seen["temperature"], seen["max_tokens"], seen["key"]) == (0, 7, f"Bearer {KEY}")


@pytest.mark.usefixtures("on_threads", "gateway")
def test_a_future_is_a_prompt() -> None:
    first = apps.chat("hello", "m")
    assert apps.chat(first, "m").result() == "HELLO"
    assert apps.chat([{"role": "user", "content": "messages"}], "m").result() == "MESSAGES"


@pytest.mark.usefixtures("on_threads")
def test_embed_keeps_the_order_and_takes_futures(gateway: type[Echo]) -> None:
    future = apps.chat("four", "m")
    assert apps.embed(["a", future, "ccc"], "m").result() == [[1.0], [4.0], [3.0]]
    assert apps.embed("alone", "m").result() == [[5.0]]
    assert apps.embed(apps.map_chat(["x", "yy"], "m"), "m").result() == [[1.0], [2.0]]
    assert apps.embed([], "m").result() == []


@pytest.mark.usefixtures("on_threads")
def test_many_texts_go_in_several_requests(gateway: type[Echo], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HttpChannel, "texts", 2)
    assert apps.embed(["a", "bb", "ccc", "dddd", "eeeee"], "m").result() == [[1.0], [2.0], [3.0], [4.0], [5.0]]
    assert sorted(len(seen["input"]) for seen in gateway.seen) == [1, 2, 2]


@pytest.mark.usefixtures("on_threads")
def test_map_chat_answers_in_order_with_several_requests_at_a_time(gateway: type[Echo]) -> None:
    prompts = [f"prompt {n}" for n in range(12)]
    gateway.company = threading.Barrier(4, timeout=30)
    assert apps.map_chat(prompts, "m", concurrency=4).result() == [prompt.upper() for prompt in prompts]
    assert gateway.at_once[1] == 4
    gateway.company = None
    assert apps.map_chat([], "m").result() == []


@pytest.mark.usefixtures("on_threads", "gateway")
def test_an_error_is_the_gateways_own() -> None:
    with pytest.raises(ModelNotFound, match="nobody"):
        apps.chat("hello", "nobody").result()
    with pytest.raises(ModelNotFound):
        apps.embed("hello", "nobody").result()
    with pytest.raises(ModelNotFound):
        apps.map_chat(["a", "b"], "nobody").result()
    errors = apps.map_chat(["a", "b"], "nobody", return_errors=True).result()
    assert [type(error) for error in errors] == [ModelNotFound, ModelNotFound]
    with pytest.raises(ConfigError, match="concurrency"):
        apps.map_chat(["a"], "m", concurrency=0)


@pytest.mark.usefixtures("on_threads")
def test_a_gateway_that_is_away_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    away = apps.Apps(url="https://127.0.0.1:9")  # discard: nobody listens there
    monkeypatch.setenv("GATEWAY_API_KEY", "k")
    with pytest.raises(GatewayUnreachable, match=r"127\.0\.0\.1:9 does not answer"):
        away.chat("hello", "m").result()


@pytest.mark.usefixtures("on_threads")
def test_tasks_of_a_process_share_one_client_of_an_endpoint_from_the_first_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[GlobusClient] = []

    def slow(*, endpoint: str, function: str | None) -> GlobusClient:
        time.sleep(0.05)  # as a login does
        made.append(GlobusClient(endpoint, function, transport=FakeTransport()))
        return made[-1]

    monkeypatch.setattr(client, "Client", slow)
    through = apps.Apps(endpoint="11111111-aaaa-4444-8888-000000000003")
    futures = [through.chat(str(number), "m") for number in range(32)]
    assert [future.result() for future in futures] == [f"re: {number}" for number in range(32)]
    assert len(made) == 1
    assert made[0].tasks_sent < 32
    made[0].close()


@pytest.mark.parametrize("beside", [{"url": "https://127.0.0.1:9"}, {"state": "/s"}, {"ca": "/ca.pem"}])
def test_an_endpoint_beside_a_gateway_is_refused_when_the_apps_are_made(beside: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="cannot be given with it"):
        apps.Apps(endpoint="11111111-aaaa-4444-8888-000000000003", **beside)


@pytest.mark.process
@pytest.mark.integration
def test_worker_processes_find_the_gateway_and_bring_errors_back(
    gateway: type[Echo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # Parsl starts scripts by name
    executor = HighThroughputExecutor(
        label="workers",
        address="127.0.0.1",
        max_workers_per_node=1,
        provider=LocalProvider(init_blocks=1, max_blocks=1),
        encrypted=False,
    )
    run_dir = tmp_path / "runinfo"
    try:
        with parsl.load(Config([executor], run_dir=str(run_dir), usage_tracking=0, initialize_logging=False)):
            bound = apps.Apps(executors=["workers"])
            assert bound.embed(bound.map_chat(["x", "yy"], "m"), "m").result(timeout=60) == [[1.0], [2.0]]
            with pytest.raises(ModelNotFound, match="nobody"):
                bound.chat("hello", "nobody").result(timeout=60)
    finally:
        parsl.clear()
    assert gateway.seen[0]["key"] == f"Bearer {KEY}"
    for path in run_dir.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path  # it did not travel with the task
