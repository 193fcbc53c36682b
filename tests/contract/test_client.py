"""The client's contract over HTTP, and through the site's own function in the place of an endpoint."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gateway_plugin import Client
from gateway_plugin.errors import ModelNotFound, WaitDeadline
from gateway_plugin.globus import GlobusClient, function
from gateway_plugin.globus.client.batches import Limits, Pace
from tests.contract.client_stories import EMBEDDER, WRITER, ClientStories
from tests.support import fake_engine
from tests.support.fake_endpoint import FakeTransport

COLD = "cold-one"
KEY = "the-key"
MODELS = [
    {"id": name, "object": "model", "created": 0, "owned_by": "gateway", "task": task, "state": state}
    for name, task, state in ((WRITER, "generate", "ready"), (EMBEDDER, "embed", "ready"), (COLD, "generate", "cold"))
]


class Gateway(BaseHTTPRequestHandler):
    """A front door with two models that are ready and one that never is; answers as the fake engine does."""

    protocol_version = "HTTP/1.1"
    asleep: threading.Event
    """Set at the end: no request sleeps any longer."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/v1/models").strip("/")
        if self.path == "/gateway/v1/status":
            return self._send(200, {"state": "ready"})
        if not name:
            return self._send(200, {"object": "list", "data": MODELS})
        found = [model for model in MODELS if model["id"] == name]
        return self._send(200, found[0]) if found else self._error(ModelNotFound(name))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model, text = body["model"], fake_engine._prompt(body)
        if self.path not in function.POST_PATHS:
            return self._send(404, {"detail": "Not Found"})
        if model not in (WRITER, EMBEDDER, COLD):
            return self._error(ModelNotFound(model))
        if model == COLD and self.headers.get("x-gateway-wait") == "0":
            return self._error(WaitDeadline("It is cold.", state="loading", eta_s=42.0))
        if found := fake_engine._SLEEP.search(text):
            self.asleep.wait(float(found[1]))
        if found := fake_engine._FAIL.search(text):
            return self._send(int(found[1]), {"error": {"message": "as it was told", "code": None}})
        if self.path == "/v1/embeddings":
            return self._send(200, fake_engine._embeddings(body, model, 1))
        if self.path == "/tokenize":
            return self._send(200, {"count": len(text.split())})
        count = int(found[1]) if (found := fake_engine._TOKENS.search(text)) else 8
        count = min(count, body.get("max_tokens") or count)
        words = [model] + [f" w{number}" for number in range(1, count)]
        if body.get("stream"):
            lines = [f"data: {json.dumps(fake_engine._delta(self.path, model, 1, word))}\n\n" for word in words]
            return self._send(200, "".join([*lines, "data: [DONE]\n\n"]))
        return self._send(200, fake_engine._answer(self.path, model, 1, words))

    def _error(self, error: ModelNotFound | WaitDeadline) -> None:
        self._send(error.status, error.body())

    def _send(self, status: int, document: Any) -> None:
        data = document.encode() if isinstance(document, str) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream" if isinstance(document, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_: Any) -> None:
        """A client that breaks off is what some stories are about."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Where the gateway listens."""
    Gateway.asleep = threading.Event()
    server = Server(("127.0.0.1", 0), Gateway)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Gateway.asleep.set()
    server.shutdown()
    thread.join()
    server.server_close()


class Stories(ClientStories):
    def test_a_cold_model_is_said_at_once_where_the_client_does_not_wait(self, client: Client) -> None:
        with pytest.raises(WaitDeadline) as caught:
            client.chat("hello", COLD, wait=False)
        assert (caught.value.status, caught.value.state, caught.value.eta_s) == (503, "loading", 42.0)
        with pytest.raises(Exception, match="It is cold") as said:
            client.openai.with_options(max_retries=0).chat.completions.create(
                model=COLD, messages=[{"role": "user", "content": "hello"}], extra_headers={"x-gateway-wait": "0"}
            )
        assert "503" in str(said.value)


class TestOverHttp(Stories):
    @pytest.fixture
    def client(self, url: str) -> Iterator[Client]:
        with Client(url, KEY, plain_http=True) as made:
            yield made


class FunctionTransport(FakeTransport):
    """Globus Compute with the site's real function behind it, several tasks at a time; JSON in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self._workers = ThreadPoolExecutor(8)

    def submit(self, group: str, request: Mapping[str, Any]) -> Future[Any]:
        text = json.dumps(request)
        future = self._workers.submit(lambda: json.loads(json.dumps(function.infer(json.loads(text)))))
        self._futures.append((group, dict(request), future))
        return future

    def close(self) -> None:
        super().close()
        self._workers.shutdown(wait=False, cancel_futures=True)


class TestThroughAnEndpoint(Stories):
    resumes = True

    @pytest.fixture
    def client(self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
        key, site = tmp_path / "endpoint.key", tmp_path / "site.json"
        key.write_text(KEY + "\n")
        key.chmod(0o600)
        site.write_text(json.dumps({"version": 1, "url": url, "key_file": str(key), "answers": str(tmp_path / "kept")}))
        monkeypatch.setenv(function.SITE_VARIABLE, str(site))
        limits, pace = Limits(flush_s=0.005), Pace(10_000, 1.0, burst=10_000)
        with GlobusClient(transport=FunctionTransport(), limits=limits, pace=pace) as made:
            yield made
