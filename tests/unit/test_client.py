"""The client's own half: where it finds the gateway, what it makes of answers. ``httpx`` talks to a function here."""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import os
import pickle
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gateway_plugin.api_types import parse_error, parse_status
from gateway_plugin.asyncio_client import AsyncClient
from gateway_plugin.catalog import MODEL_NAME
from gateway_plugin.client import Client, gateway_error, unreachable
from gateway_plugin.connection import find_gateway, on_loopback
from gateway_plugin.errors import (
    ConfigError,
    Forbidden,
    GatewayError,
    GatewayUnreachable,
    InvalidKey,
    InvalidRequest,
    ModelNotFound,
    ModelQueueFull,
    ModelUnavailable,
    ServiceError,
    WaitDeadline,
)
from gateway_plugin.http_channel import HttpChannel
from gateway_plugin.model_header import NAME, model_header
from gateway_plugin.ownership import private_folder
from gateway_plugin.paths import Layout
from gateway_plugin.tls import make_authority

URL = "https://127.0.0.1:8180"


@pytest.fixture(autouse=True)
def _no_gateway_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GATEWAY_URL", "GATEWAY_API_KEY", "GATEWAY_CA", "GATEWAY_PLAIN_HTTP", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    monkeypatch.setenv("GATEWAY_STATE", str(tmp_path / "none"))


def local_gateway(
    state: Path, url: str = URL, key: str | None = "admin-secret", host: str = "", own_certificate: bool = True
) -> Layout:
    """A state folder as ``up`` leaves it, of a gateway on ``host`` (this machine)."""
    layout = Layout(private_folder(state))
    document = {"url": url, "host": host or socket.gethostname(), "own_certificate": own_certificate}
    layout.service_json.write_text(json.dumps(document))
    if key is not None:
        layout.admin_key.write_text(key + "\n")
    return layout


@contextmanager
def listening(layout: Layout) -> Iterator[None]:
    """Its owner socket is there."""
    private_folder(layout.run)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(layout.owner_door))
        door.listen()
        yield


def model(state: str = "ready", name: str = "tiny", **more: Any) -> dict[str, Any]:
    return {"id": name, "object": "model", "task": "generate", "aliases": ["t"], "state": state, **more}


def client(answer: Callable[[httpx.Request], Any]) -> Client:
    return Client(URL, "secret", transport=httpx.MockTransport(answer))


def scripted(*answers: tuple[int, Any]) -> tuple[Client, list[httpx.Request]]:
    """A client whose requests get ``answers`` in order (the last one again and again), and the requests it sent."""
    sent: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        status, body = answers[min(len(sent), len(answers) - 1)]
        sent.append(request)
        return httpx.Response(status, json=body)

    return client(answer), sent


# --- where the gateway is ---


def test_arguments_go_before_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GATEWAY_URL", "https://elsewhere:1")
    monkeypatch.setenv("GATEWAY_API_KEY", "other")
    monkeypatch.setenv("GATEWAY_CA", str(tmp_path / "other.pem"))
    assert find_gateway("https://here:2/v1/", "mine", ca="/mine.pem") == (
        "https://here:2",
        "mine",
        Path("/mine.pem"),
        None,
    )


def test_the_environment_goes_before_the_local_gateway(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    local_gateway(tmp_path / "s")
    monkeypatch.setenv("GATEWAY_STATE", str(tmp_path / "s"))
    monkeypatch.setenv("GATEWAY_URL", "https://elsewhere:1")
    monkeypatch.setenv("GATEWAY_API_KEY", "other")
    assert find_gateway() == ("https://elsewhere:1", "other", None, None)


def test_the_local_gateway_is_found_by_its_state_folder_and_reached_by_its_own_socket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layout = local_gateway(tmp_path / "s")
    monkeypatch.setenv("GATEWAY_STATE", str(tmp_path / "s"))
    with listening(layout):
        assert find_gateway() == (URL, "admin-secret", layout.ca, layout.owner_door)


def test_a_state_folder_that_is_named_goes_before_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layout = local_gateway(tmp_path / "s")
    monkeypatch.setenv("GATEWAY_URL", "https://elsewhere:1")
    monkeypatch.setenv("GATEWAY_API_KEY", "other")
    with listening(layout):
        assert find_gateway(state=tmp_path / "s")[:2] == (URL, "admin-secret")


def test_the_local_admin_key_goes_to_no_other_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    local_gateway(tmp_path / "s")
    monkeypatch.setenv("GATEWAY_STATE", str(tmp_path / "s"))
    with pytest.raises(InvalidKey, match="GATEWAY_API_KEY"):
        find_gateway("https://127.0.0.1:9999")
    monkeypatch.setenv("GATEWAY_URL", "https://somewhere.example")
    with pytest.raises(InvalidKey):
        find_gateway()


@pytest.mark.parametrize("garbled", [b"\xff\xfe", "gw-\u00e9".encode(), b"gw-\0", b""])
def test_a_garbled_admin_key_is_named_and_another_one_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, garbled: bytes
) -> None:
    layout = local_gateway(tmp_path / "s")
    layout.admin_key.write_bytes(garbled)
    with listening(layout):
        with pytest.raises(InvalidKey, match=r"admin\.key is garbled.*keys revoke admin-cli"):
            find_gateway(state=tmp_path / "s")
        monkeypatch.setenv("GATEWAY_API_KEY", "other")
        assert find_gateway(state=tmp_path / "s").key == "other"


def test_the_local_gateway_s_own_url_is_verified_with_its_own_authority(tmp_path: Path) -> None:
    layout = local_gateway(tmp_path / "s")
    assert find_gateway(URL, state=tmp_path / "s") == (URL, "admin-secret", layout.ca, None)


def test_no_key_goes_to_this_machine_s_loopback_for_a_gateway_of_another(tmp_path: Path) -> None:
    local_gateway(tmp_path / "s", host="login01.other")
    with pytest.raises(GatewayUnreachable, match=r"login01\.other.*No key was sent"):
        find_gateway(state=tmp_path / "s")


def test_a_gateway_of_another_machine_is_reached_over_tls_and_verified(tmp_path: Path) -> None:
    layout = local_gateway(tmp_path / "s", "https://login01:8180", host="login01.other")
    assert find_gateway(state=tmp_path / "s") == ("https://login01:8180", "admin-secret", layout.ca, None)
    other = local_gateway(tmp_path / "t", "https://login01:8180", host="login01.other", own_certificate=False)
    assert find_gateway(state=other.state).ca is None


def test_no_key_goes_to_the_port_of_a_gateway_that_is_down(tmp_path: Path) -> None:
    layout = local_gateway(tmp_path / "s")
    with pytest.raises(GatewayUnreachable, match=r"does not run.*gateway up"):
        find_gateway(state=layout.state)


def test_what_is_no_socket_of_this_user_gets_no_key(tmp_path: Path) -> None:
    layout = local_gateway(tmp_path / "s")
    private_folder(layout.run)
    layout.owner_door.write_text("")
    with pytest.raises(GatewayUnreachable, match="not a socket of this user"):
        find_gateway(state=layout.state)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder that is somebody else's")
def test_a_foreign_state_folder_is_not_read(tmp_path: Path) -> None:
    layout = local_gateway(tmp_path / "s")
    os.chown(layout.state, 65534, 65534)
    with pytest.raises(ServiceError, match="is not a folder of this user"):
        find_gateway(state=layout.state)


def test_plain_http_wants_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="GATEWAY_PLAIN_HTTP=1"):
        find_gateway("http://127.0.0.1:8180", "k")
    assert find_gateway("http://127.0.0.1:8180", "k", plain_http=True)[:2] == ("http://127.0.0.1:8180", "k")
    monkeypatch.setenv("GATEWAY_PLAIN_HTTP", "1")
    assert find_gateway("http://127.0.0.1:8180", "k").url == "http://127.0.0.1:8180"
    with pytest.raises(ConfigError, match="plain HTTP"):
        find_gateway("http://127.0.0.1:8180", "k", plain_http=False)


def test_the_authority_of_a_state_folder_that_is_given_goes_before_the_environment_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layout = local_gateway(tmp_path / "s", "https://login01:8180", host="login01.other")
    monkeypatch.setenv("GATEWAY_CA", "/of/another/site.pem")
    assert find_gateway(state=layout.state).ca == layout.ca
    assert find_gateway(state=layout.state, ca="/this.pem").ca == Path("/this.pem")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder that is somebody else's")
def test_where_url_and_key_are_given_a_foreign_state_folder_is_neither_read_nor_in_the_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layout = local_gateway(tmp_path / "s")
    os.chown(layout.state, 65534, 65534)
    monkeypatch.setenv("GATEWAY_STATE", str(layout.state))
    assert find_gateway(URL, "k") == (URL, "k", None, None)
    with pytest.raises(ServiceError, match="is not a folder of this user"):
        find_gateway(URL)
    monkeypatch.setenv("GATEWAY_URL", URL)
    monkeypatch.setenv("GATEWAY_API_KEY", "k")
    assert find_gateway().key == "k"


def test_a_server_that_cannot_prove_itself_is_told_from_one_that_is_away(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "s")
    make_authority(layout, front_hosts=("127.0.0.1",))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(layout.front_identity)
    got: list[str] = []

    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            got.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hangs up is what is wanted
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        url = f"https://127.0.0.1:{server.server_port}"
        for ca in (None, tmp_path / "s/tls/front.pem"):
            with Client(url, "very-secret", ca=ca) as gateway, pytest.raises(GatewayUnreachable) as caught:
                gateway.models()
            assert "has not proved to be the gateway" in caught.value.message
            assert "GATEWAY_CA" in caught.value.message
            assert caught.value.retry_after_s is None
            with Client(url, "very-secret", ca=ca) as gateway, pytest.raises(openai.APIConnectionError) as failed:
                gateway.openai.with_options(max_retries=0).models.list()
            assert "has not proved" in gateway_error(failed.value, url).message
        assert got == []
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_file_of_certificates_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for name in ("ca.pem", "none.pem"):
        with pytest.raises(ConfigError, match=rf"{name}.*GATEWAY_CA"):
            Client(URL, "k", ca=tmp_path / name)


def test_without_any_gateway_it_says_what_to_do() -> None:
    with pytest.raises(GatewayUnreachable, match="gateway up"):
        Client()


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(GatewayError, match="https://host:port"):
        find_gateway("localhost:8180", "k")


@pytest.mark.parametrize(
    ("url", "is_local"),
    [
        (URL, True),
        ("http://localhost:1", True),
        ("http://[::1]:1", True),
        ("https://gateway.example", False),
        ("http://10.0.0.1:1", False),
        ("https://127.example.org", False),
    ],
)
def test_only_loopback_bypasses_the_proxy(url: str, is_local: bool) -> None:
    assert on_loopback(url) is is_local


def test_neither_a_client_nor_its_openai_shows_the_key() -> None:
    with Client(URL, "very-secret") as gateway:
        assert "very-secret" not in repr(gateway) + str(vars(gateway)["_http"])
        assert str(gateway.openai.base_url) == f"{URL}/v1/"
        assert gateway.openai.api_key == "very-secret"
        assert gateway.async_openai.api_key == "very-secret"


# --- answers ---


def test_models_are_parsed_and_unknown_keys_left_alone() -> None:
    gateway, sent = scripted((200, {"object": "list", "data": [model("loading", eta_s=12.5, nodes=["n1"], new_key=1)]}))
    (found,) = gateway.models()
    assert (found.name, found.state, found.eta_s, found.nodes, found.ready) == ("tiny", "loading", 12.5, ("n1",), False)
    assert sent[0].headers["authorization"] == "Bearer secret"


def test_a_model_name_with_a_slash_stays_in_one_path() -> None:
    gateway, sent = scripted((200, model(name="org/name")))
    gateway.model("org/name")
    assert sent[0].url.raw_path == b"/v1/models/org/name"


def test_status_keeps_the_whole_document() -> None:
    document = {
        "state": "ready",
        "models": [model()],
        "engines": [],
        "nodes": [],
        "waiting": 1,
        "switches": 7,
        "epoch": 3,
    }
    status = parse_status(document)
    assert (status.switches, status.waiting, status.document["epoch"]) == (7, 1, 3)
    assert status.model("t") is status.model("tiny") is not None
    assert status.model("nobody") is None


@pytest.mark.parametrize(
    "error",
    [
        ModelNotFound("x", ("a", "b")),
        ModelQueueFull("m", 10, 7.0),
        InvalidKey("no"),
        Forbidden("no"),
        ModelUnavailable("gone", retry_after_s=3.0, state="failed", eta_s=4.0),
        WaitDeadline("late", state="loading", eta_s=9.0, retry_after_s=9.0),
    ],
)
def test_an_error_comes_back_as_it_went(error: GatewayError) -> None:
    headers = {key.lower(): value for key, value in error.headers().items()}
    found = parse_error(error.status, json.loads(json.dumps(error.body())), headers)
    assert type(found) is type(error)
    for again in (found, pickle.loads(pickle.dumps(found))):
        assert (again.message, again.status, again.state) == (error.message, error.status, error.state)
        assert (again.eta_s, again.retry_after_s) == (error.eta_s, error.retry_after_s)


def test_an_engines_own_error_is_told_by_its_status() -> None:
    body = {"error": {"message": "max_tokens must be at least 1", "type": "BadRequestError", "code": 400}}
    found = parse_error(400, body, {})
    assert isinstance(found, InvalidRequest)
    assert found.message == "max_tokens must be at least 1"


def test_a_code_without_a_class_is_kept_and_may_be_tried_again() -> None:
    body = {"error": {"message": "over its limit", "type": "rate_limit_error", "code": "too_hot", "param": None}}
    found = parse_error(429, body, {"retry-after": "5"})
    assert (type(found), found.code, found.status, found.retry_after_s) == (GatewayError, "too_hot", 429, 5.0)
    assert (found.exit_code, pickle.loads(pickle.dumps(found)).code) == (75, "too_hot")


@pytest.mark.parametrize("body", [None, [], "oops", {"error": "text"}, {"detail": "x"}, {"error": {"message": None}}])
def test_any_body_makes_an_error_with_its_status(body: object) -> None:
    found = parse_error(502, body, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"})
    assert type(found) is GatewayError
    assert found.status == 502
    assert "502" in found.message


def test_nothing_listening_is_said_with_the_address_and_the_way_out() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused")

    with pytest.raises(GatewayUnreachable, match=rf"{URL} does not answer .*refused.*loopback.*the tunnel") as told:
        client(refuse).models()
    assert "gateway up" not in told.value.message, "it is not this user's to start"
    with pytest.raises(GatewayUnreachable, match=r"GATEWAY_URL.*takes a tunnel.*those who run it") as told:
        Client("https://gpu.example.org:8180", "k", transport=httpx.MockTransport(refuse)).models()
    assert "gateway up" not in told.value.message
    assert "'gateway up' starts it" in unreachable(URL, httpx.ConnectError("refused"), at_hand=True).message


def test_something_else_on_the_port_is_said() -> None:
    with pytest.raises(GatewayUnreachable, match="is not a gateway"):
        client(lambda request: httpx.Response(200, text="<html>")).models()


@pytest.mark.parametrize(
    ("call", "path", "body"),
    [
        (lambda c: c.load("m"), "/gateway/v1/models/load", {"model": "m"}),
        (lambda c: c.unload("m"), "/gateway/v1/models/unload", {"model": "m"}),
        (lambda c: c.pin("m"), "/gateway/v1/models/pin", {"model": "m"}),
        (lambda c: c.unpin("m"), "/gateway/v1/models/unpin", {"model": "m"}),
        (lambda c: c.apply({"models": {}}), "/gateway/v1/models/apply", {"models": {}}),
        (lambda c: c.drain_block("b"), "/gateway/v1/blocks/drain", {"block": "b"}),
        (lambda c: c.retry_blocks("gpu"), "/gateway/v1/blocks/retry", {"type": "gpu"}),
    ],
)
def test_the_verbs_post_what_the_design_says(call: Callable[[Client], None], path: str, body: dict[str, Any]) -> None:
    gateway, sent = scripted((200, {"ok": True}))
    call(gateway)
    assert (sent[0].method, sent[0].url.path, json.loads(sent[0].content)) == ("POST", path, body)


# --- waiting ---


def test_a_ready_model_is_not_asked_for() -> None:
    gateway, sent = scripted((200, model()))
    assert gateway.wait_until_ready("tiny").ready
    assert len(sent) == 1


def test_a_cold_model_is_asked_for_once_and_waited_for() -> None:
    gateway, sent = scripted((200, model("cold")), (200, {"ok": True}), (200, model("loading")), (200, model()))
    assert gateway.wait_until_ready("tiny", poll_s=0).ready
    assert [request.url.path for request in sent].count("/gateway/v1/models/load") == 1


class Loading:
    """A gateway with a user's key and one model: not ready (``state``) until ``ready`` is set. A request for it stays
    open until then, or gets ``error``.
    """

    def __init__(self, task: str, state: str = "cold", error: GatewayError | None = None) -> None:
        self._task, self._state, self._error = task, state, error
        self.sent: list[httpx.Request] = []
        self.asked, self.cut, self.ready = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, request: httpx.Request) -> Any:
        if request.method == "GET":
            state = "ready" if self.ready.is_set() else self._state
            return httpx.Response(200, json=model(state, reason="an hour ago") | {"task": self._task})
        if request.url.path == "/gateway/v1/models/load":
            return httpx.Response(403, json=Forbidden("no").body())
        self.sent.append(request)
        return self._hold()

    async def _hold(self) -> httpx.Response:
        if self._error is not None:
            return httpx.Response(self._error.status, json=self._error.body())
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cut.set()
        raise AssertionError("it waits until it is cancelled")


@pytest.mark.parametrize(("task", "path"), [("generate", "/v1/chat/completions"), ("embed", "/v1/embeddings")])
def test_a_users_key_keeps_a_request_waiting_for_the_model(task: str, path: str) -> None:
    loading = Loading(task, "failed")
    with client(loading) as gateway, ThreadPoolExecutor(1) as thread:
        found = thread.submit(gateway.wait_until_ready, "tiny", 60.0, poll_s=0.01, failed_s=0.05)
        assert loading.asked.wait(60)
        with pytest.raises(TimeoutError):
            found.result(0.3)  # an old failure does not end it meanwhile
        assert not loading.cut.is_set()
        loading.ready.set()
        assert found.result(60).ready
        assert loading.cut.wait(60)
    (request,) = loading.sent
    assert request.url.path == path
    assert "x-gateway-wait" not in request.headers


def test_the_error_of_the_request_that_waits_for_a_model_is_the_wait_s() -> None:
    with client(Loading("generate", "queued", InvalidRequest("as it was told"))) as gateway:
        with pytest.raises(InvalidRequest, match="as it was told"):
            gateway.wait_until_ready("tiny", 30.0, poll_s=0.01)


def test_an_old_failure_does_not_end_the_wait() -> None:
    failed = (200, model("failed", reason="old"))
    gateway, _ = scripted(failed, (200, {"ok": True}), failed, failed, (200, model("loading")), (200, model()))
    assert gateway.wait_until_ready("tiny", poll_s=0).ready


def test_a_failure_that_lasts_is_told_with_the_engines_last_words() -> None:
    gateway, _ = scripted((200, model("cold")), (200, {"ok": True}), (200, model("failed", reason="no such file")))
    with pytest.raises(ModelUnavailable, match="no such file"):
        gateway.wait_until_ready("tiny", poll_s=0, failed_s=0)


def test_the_wait_ends_at_its_deadline() -> None:
    gateway, _ = scripted((200, model("cold")), (200, {"ok": True}), (200, model("loading", eta_s=40.0)))
    with pytest.raises(WaitDeadline, match="is loading") as caught:
        gateway.wait_until_ready("tiny", timeout_s=0.5, poll_s=0)
    assert caught.value.eta_s == 40.0


def test_an_unknown_model_is_told_at_once() -> None:
    gateway, _ = scripted((404, ModelNotFound("nobody").body()))
    with pytest.raises(ModelNotFound, match="nobody"):
        gateway.wait_until_ready("nobody")


def test_what_a_queued_model_waits_for_comes_through_an_error() -> None:
    said = WaitDeadline(
        "not ready", retry_after_s=47.0, state="queued", eta_s=47.0, reason="job 7 waits: Resources", position=3
    )
    error = parse_error(said.status, said.body(), {"retry-after": "47"})
    assert isinstance(error, WaitDeadline)
    assert (error.state, error.eta_s, error.reason, error.retry_after_s) == (said.state, 47.0, said.reason, 47.0)
    assert error.position == 3
    assert parse_error(503, {"error": {"reason": ["no", "text"]}}, {}).reason is None


# --- many requests at a time ---


def test_a_client_that_is_dropped_ends_its_thread() -> None:
    answer = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "hello"}}]}
    gateway, _ = scripted((200, answer))
    others = set(threading.enumerate())
    assert gateway.chat("a", "tiny") == "hello"
    (thread,) = (one for one in threading.enumerate() if one.name == "gateway-client" and one not in others)
    del gateway
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.process
def test_a_forked_process_sends_by_itself_and_its_parent_goes_on() -> None:
    gateway, _ = scripted((200, ANSWER))
    assert gateway.chat("a", "tiny") == "hello"
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=lambda: theirs.send(gateway.map_chat(["a", "b"], "tiny")))
    child.start()
    try:
        assert ours.poll(60), "the child has no answer"
        assert ours.recv() == ["hello", "hello"]
        assert gateway.chat("a", "tiny") == "hello"
    finally:
        child.kill()
        child.join()
        gateway.close()


@pytest.mark.process
def test_a_program_that_forgets_to_close_ends() -> None:
    program = (
        "import socket; from gateway_plugin import Client\n"
        "door = socket.create_server(('127.0.0.1', 0))\n"  # takes connections, and answers nothing
        "gateway = Client(f'http://127.0.0.1:{door.getsockname()[1]}', 'k', plain_http=True)\n"
        "gateway.submit_chat('hello', 'tiny'); door.accept(); print('sent')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "sent\n", "")


class Half:
    """Answers no request but those that have ``fail`` in them: with a 400, once another one hangs."""

    def __init__(self) -> None:
        self.sent: list[httpx.Request] = []
        self.hanging, self.cut = threading.Event(), threading.Event()
        """``cut``: a request that hung was cancelled."""

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(request)
        if b"fail" in request.content:
            await asyncio.to_thread(self.hanging.wait, 10)
            return httpx.Response(400, json=InvalidRequest("as it was told").body())
        self.hanging.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cut.set()
        raise AssertionError("it hangs until it is cancelled")


def test_an_error_of_embed_ends_its_other_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HttpChannel, "texts", 1)
    half = Half()
    with Client(URL, "secret", transport=httpx.MockTransport(half)) as gateway:
        with pytest.raises(InvalidRequest):
            gateway.embed(["fail", "hang"], "vectors")
        assert half.cut.wait(60)


@pytest.mark.parametrize("options", [{"stop": {1, 2}}, {"temperature": float("nan")}, {"user": "\ud800"}])
def test_what_is_no_json_is_an_invalid_request_and_not_sent(options: dict[str, Any]) -> None:
    gateway, sent = scripted((200, {}))
    with pytest.raises(InvalidRequest, match="JSON"):
        gateway.chat("hello", "tiny", **options)
    with pytest.raises(InvalidRequest, match="JSON"):
        gateway.map_chat(["hello"], "tiny", **options)
    assert sent == []


ANSWER = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "hello"}}]}


def test_extra_headers_are_headers_and_never_in_the_body() -> None:
    gateway, sent = scripted((200, ANSWER))
    assert gateway.chat("a", "tiny", extra_headers={"X-Trace": "t", "x-gateway-wait": "9"}) == "hello"
    assert gateway.map_chat(["a"], "tiny", extra_headers={"X-Gateway-Wait": "0"}) == ["hello"]
    assert [request.headers.get("x-gateway-wait") for request in sent] == ["9", "0"]
    assert sent[0].headers["x-trace"] == "t"
    assert all(sorted(json.loads(request.content)) == ["messages", "model"] for request in sent)
    scripted_vectors, asked = scripted((200, {"data": [{"index": 0, "embedding": [0.5]}]}))
    options = {"extra_headers": {"X-Trace": "t"}, "extra_body": {"dimensions": 1}, "timeout": 9}
    assert scripted_vectors.embed("a", "vectors", **options) == [[0.5]]
    assert sorted(json.loads(asked[0].content)) == ["dimensions", "encoding_format", "input", "model"]
    for wrong in ({"extra_query": {"a": 1}}, {"extra_headers": {"a": "b\nc"}}, {"extra_headers": {"a": 1}}):
        with pytest.raises(InvalidRequest, match="extra_"):
            gateway.chat("a", "tiny", **wrong)


def test_requests_that_wait_for_a_model_are_in_the_way_of_no_others() -> None:
    full, waiting = threading.Event(), []

    async def answer(request: httpx.Request) -> httpx.Response:
        if b"cold" in request.content and request.headers.get("x-gateway-wait") != "0":
            waiting.append(request)
            if len(waiting) == 64:
                full.set()
            await asyncio.Event().wait()
        return httpx.Response(200, json=ANSWER)

    with Client(URL, "secret", transport=httpx.MockTransport(answer)) as gateway:
        for _ in range(64):
            gateway.submit_chat("a", "cold")
        assert full.wait(30)
        late = gateway.submit_chat("a", "cold", timeout_s=0.2)
        with pytest.raises(WaitDeadline):
            late.result(60)
        assert gateway.submit_chat("a", "warm").result(60) == "hello"
        assert gateway.submit_chat("a", "cold", wait=False).result(60) == "hello"
    assert len(waiting) == 64, "the 65th waits here"


def test_what_is_sent_again_is_what_openai_sends_again() -> None:
    gateway, sent = scripted((503, ModelQueueFull("tiny", 1).body()))
    with pytest.raises(ModelQueueFull):
        gateway.chat("a", "tiny")
    assert len(sent) == 3
    with pytest.raises(ModelQueueFull):
        gateway.chat("a", "tiny", wait=False)
    assert len(sent) == 4, "with the state at once"
    assert sent[-1].headers["x-gateway-wait"] == "0"


def test_an_error_whose_retry_after_is_past_the_time_limit_is_raised_at_once() -> None:
    sent: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        error = ModelQueueFull("tiny", 1, retry_after_s=30.0)
        return httpx.Response(error.status, json=error.body(), headers=error.headers())

    with pytest.raises(ModelQueueFull) as caught:
        client(answer).chat("a", "tiny", timeout_s=1.0)
    assert (caught.value.state, caught.value.retry_after_s, len(sent)) == ("queue_full", 30.0, 1)


# --- asyncio ---


async def test_asyncio_s_embed_ends_the_other_requests_at_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HttpChannel, "texts", 1)
    half = Half()
    async with AsyncClient(URL, "secret", transport=httpx.MockTransport(half)) as both:
        with pytest.raises(InvalidRequest):
            await both.embed(["fail", "hang"], "vectors")
        assert await asyncio.to_thread(half.cut.wait, 10)


async def test_asyncio_s_client_has_the_plain_attributes_of_the_other() -> None:
    async with AsyncClient(URL, "secret", transport=httpx.MockTransport(lambda _: httpx.Response(200))) as both:
        assert (both.url, both.at_hand, both.streams) == (URL, False, True)
        assert both.timeout_s == both.sync.timeout_s


@pytest.mark.parametrize(
    ("body", "header"),
    [
        ({"model": "org/m:1"}, {"x-gateway-model": "org/m:1"}),
        ({"model": "a;b"}, {}),
        ({"model": "a\n"}, {}),
        ({"model": 5}, {}),
        ({}, {}),
        (None, {}),
        ([1], {}),
    ],
)
def test_a_request_names_its_model_in_the_header(body: object, header: dict[str, str]) -> None:
    assert model_header(body) == header
    assert NAME == MODEL_NAME


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/audio/transcriptions", "/v1/images/edits"])
def test_files_are_left_to_openai(path: str) -> None:
    gateway, sent = scripted((200, {}))
    with pytest.raises(InvalidRequest, match="files are sent and fetched by"):
        gateway.submit(path, {"model": "m", "input": "x"})
    assert sent == []


def test_every_request_of_openai_and_of_the_client_names_its_model_unless_its_caller_does() -> None:
    named: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        named.append(request.headers.get("x-gateway-model"))
        return httpx.Response(200, json={"text": "", "choices": [], "data": []})

    with Client(URL, "k", transport=httpx.MockTransport(answer)) as client:
        chats = client.openai.chat.completions
        chats.create(model="m", messages=[])
        client.openai.audio.transcriptions.create(model="whisper", file=("a.wav", b"RIFF"))
        chats.create(model="m", messages=[], extra_headers={"X-Gateway-Model": "another"})
        client.openai.with_options(max_retries=0).chat.completions.create(model="m", messages=[])
        client.openai.models.list()
    assert named == ["m", "whisper", "another", "m", None]
