"""The function that runs on the endpoint: what it refuses, how it asks the gateway, what it remembers."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import json
import os
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gateway_plugin.globus import function
from gateway_plugin.globus.function_registry import source
from gateway_plugin.passing import FORMS, INFERENCE
from tests.support.gateways import wait_for

Reply = Callable[[dict[str, Any]], tuple[int, dict[str, Any], dict[str, str]]]
PERSON = "11111111-aaaa-4444-8888-000000000001"


class Gateway:
    """An HTTP server that answers as it is told, and keeps what it was asked."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.reply: Reply = lambda body: (200, {"echo": body}, {})
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
                with outer._lock:
                    outer.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                    outer._now += 1
                    outer.most = max(outer.most, outer._now)
                status, document, headers = outer.reply(body)
                with outer._lock:
                    outer._now -= 1
                data = json.dumps(document).encode()
                self.send_response(status)
                for name, value in {"content-length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                """Silent."""

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """A client that breaks off is what some tests are about."""

        self._server = Server(("127.0.0.1", 0), Handler)
        if certificate is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(certificate)
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"{'http' if certificate is None else 'https'}://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    made = Gateway()
    yield made
    made.close()


@pytest.fixture
def site(gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The site's file for ``gateway``; what a test changes, it writes again with ``write_site``."""
    key = tmp_path / "endpoint.key"
    key.write_text("secret-key\n")
    key.chmod(0o600)
    (tmp_path / "input").mkdir()
    document = {
        "version": 1, "url": gateway.url, "key_file": str(key), "answers": str(tmp_path / "answers"),
        "input_folder": str(tmp_path / "input"),
    }  # fmt: skip
    monkeypatch.setenv(function.SITE_VARIABLE, str(tmp_path / "site.json"))
    monkeypatch.setenv(function.CALLER_VARIABLE, PERSON)
    write_site(tmp_path, document)
    return document


def write_site(folder: Path, document: dict[str, Any]) -> None:
    (folder / "site.json").write_text(json.dumps(document))


def chat(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"path": "/v1/chat/completions", "body": {"model": "m", "messages": [{"content": text}], **more}}


def request(*items: dict[str, Any], **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"version": 1, "key": uuid.uuid4().hex, "deadline_s": 10, "wait": True}
    if "input" not in more:
        made["items"] = list(items) or [chat()]
    return made | more


def error_of(answer: dict[str, Any]) -> str:
    assert set(answer) == {"version", "function", "error"}, answer
    return str(answer["error"]["code"])


@pytest.mark.process
def test_in_a_bare_interpreter(site: dict[str, Any]) -> None:
    program = (
        "import json, sys; space = {}; exec(sys.argv[1], space);print(json.dumps(space['infer'](json.load(sys.stdin))))"
    )
    ended = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, source()],
        input=json.dumps(request(chat("a"), chat("b"))), capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert [item["status"] for item in answer["items"]] == [200, 200]
    assert answer["items"][1]["body"]["echo"] == chat("b")["body"]
    assert answer["function"] == function.FUNCTION_VERSION
    assert answer["repeated"] is False


def test_serves_the_paths_that_the_edge_serves_but_those_of_files() -> None:
    assert {*function.POST_PATHS, *function.FILE_PATHS} == set(INFERENCE)
    assert set(function.FILE_PATHS) == {*FORMS, "/v1/audio/speech"}
    assert not set(function.FILE_PATHS) & set(function.POST_PATHS)


@pytest.mark.parametrize("path", function.FILE_PATHS)
def test_a_file_is_refused_with_another_way(path: str) -> None:
    with pytest.raises(function.Refusal, match="send it over HTTP"):
        function.check_item({"path": path, "body": {"model": "m"}}, "item 0")


def test_key_caller_and_patience_go_along(site: dict[str, Any], gateway: Gateway) -> None:
    function.infer(request(chat(), {"path": "/v1/models"}))
    function.infer(request(wait=False))
    posted, listed, hurried = sorted(gateway.asked, key=lambda asked: (asked[1]["x-gateway-wait"] == "0", asked[0]))
    assert listed[0] == "/v1/models"
    assert posted[1]["authorization"] == "Bearer secret-key"
    assert posted[1]["x-gateway-caller"] == PERSON
    assert 8 <= int(posted[1]["x-gateway-wait"]) <= 10
    assert hurried[1]["x-gateway-wait"] == "0"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"version": 2}, "invalid_request"),
        ({"key": "short"}, "invalid_request"),
        ({"key": "../../../etc/passwd"}, "invalid_request"),
        ({"deadline_s": 0}, "invalid_request"),
        ({"deadline_s": True}, "invalid_request"),
        ({"deadline_s": float("nan")}, "invalid_request"),
        ({"wait": 1}, "invalid_request"),
        ({"items": []}, "invalid_request"),
        ({"items": [chat()] * 10_001}, "invalid_request"),
        ({"input": {}}, "invalid_request"),
        ({"url": "http://evil"}, "unknown_option"),
        ({"items": [{**chat(), "url": "http://evil"}]}, "unknown_option"),
        ({"items": [{"custom_id": "a", "method": "POST", "url": "/v1/x", "body": {}}]}, "unknown_option"),
        ({"items": [{**chat(), "headers": {}}]}, "unknown_option"),
        ({"items": [{**chat(), "path": "/gateway/v1/status"}]}, "path_not_allowed"),
        ({"items": [{**chat(), "path": "/v1/chat/completions?x=1"}]}, "path_not_allowed"),
        ({"items": [{**chat(), "path": "http://evil/v1/chat/completions"}]}, "path_not_allowed"),
        ({"items": [{**chat(), "path": ["/v1/models"]}]}, "path_not_allowed"),
        ({"items": [{"path": "/v1/models", "body": {}}]}, "path_not_allowed"),
        ({"items": [{"path": "/v1/embeddings"}]}, "invalid_request"),
        ({"items": [chat(stream=True)]}, "no_streaming"),
    ],
)
def test_what_is_not_a_request_is_refused_and_nothing_is_asked(
    site: dict[str, Any], gateway: Gateway, change: dict[str, Any], code: str
) -> None:
    assert error_of(function.infer(request() | change)) == code
    assert gateway.asked == []
    nonsense: Any
    for nonsense in (None, [], "text", {1: 2}, 5):
        assert error_of(function.infer(nonsense)) == "invalid_request"


def test_items_of_a_pack_run_together(site: dict[str, Any], gateway: Gateway) -> None:
    together = threading.Barrier(16, timeout=60)

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        together.wait()
        return 200, {}, {}

    gateway.reply = reply
    answer = function.infer(request(*(chat(str(i)) for i in range(16))))
    assert [item["status"] for item in answer["items"]] == [200] * 16
    assert gateway.most == 16


def test_answers_come_in_the_order_of_the_items_and_not_all_need_succeed(
    site: dict[str, Any], gateway: Gateway
) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        text = body["messages"][0]["content"]
        if text == "3":
            return 404, {"error": {"message": "no", "code": "model_not_found"}}, {}
        time.sleep(0.02 * (5 - int(text)))
        return 200, {"text": text}, {}

    gateway.reply = reply
    answer = function.infer(request(*(chat(str(i)) for i in range(5))))
    assert [item.get("body", {}).get("text") for item in answer["items"]] == ["0", "1", "2", None, "4"]
    assert answer["items"][3] == {"status": 404, "error": {"message": "no", "code": "model_not_found"}}


def loading(times: int) -> Reply:
    left = [times]

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        left[0] -= 1
        if left[0] >= 0:
            error = {"message": "m", "code": "wait_deadline", "state": "loading", "eta_s": 12.0}
            return 503, {"error": error}, {"Retry-After": "0"}
        return 200, {"ready": True}, {}

    return reply


def test_a_cold_model_is_said_at_once_to_who_does_not_wait_and_asked_again_for_who_does(
    site: dict[str, Any], gateway: Gateway
) -> None:
    gateway.reply = loading(2)
    (item,) = function.infer(request(wait=False))["items"]
    assert item["status"] == 503
    assert (item["error"]["state"], item["error"]["eta_s"]) == ("loading", 12.0)
    assert len(gateway.asked) == 1
    (item,) = function.infer(request(wait=True))["items"]
    assert item == {"status": 200, "body": {"ready": True}}
    assert len(gateway.asked) == 3


def test_the_deadline_holds_when_the_gateway_never_answers(site: dict[str, Any], gateway: Gateway) -> None:
    released = threading.Event()

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        if body["messages"][0]["content"] == "hang":
            released.wait(60)
        return 200, {}, {}

    gateway.reply = reply
    answer = function.infer(request(chat("hang"), chat("quick"), deadline_s=3))
    released.set()
    assert [item["status"] for item in answer["items"]] == [504, 200]
    assert answer["items"][0]["error"]["code"] == "deadline"
    assert answer["seconds"] < 30


def test_a_gateway_that_is_down_is_said_to_be_in_time(
    site: dict[str, Any], gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.close()
    monkeypatch.setattr(function, "UNREACHABLE_S", 0.5)
    answer = function.infer(request(*(chat(str(i)) for i in range(200)), deadline_s=60))
    assert {item["status"] for item in answer["items"]} == {503}
    assert {item["error"]["code"] for item in answer["items"]} == {"gateway_unreachable"}
    assert answer["seconds"] < 10, "they do not wait one after the other"


def breaking_off(times: int) -> Reply:
    left = [times]

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionError("the handler ends, and its connection with it")
        return 200, {"ready": True}, {}

    return reply


def test_a_gateway_that_takes_connections_again_is_not_down(site: dict[str, Any], gateway: Gateway) -> None:
    """It was down, long before it broke off in the middle of an answer."""
    gateway.reply = breaking_off(1)
    asked = function.Gateway(site, "secret-key", PERSON, True, time.monotonic() + 10)
    asked.down_since = time.monotonic() - 60
    caller = function.Caller(asked)
    assert caller.ask(chat()) == {"status": 200, "body": {"ready": True}}
    caller.close()
    assert asked.down_since is None


def test_a_gateway_that_breaks_off_each_time_is_not_asked_for_ever(
    site: dict[str, Any], gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function, "HANG_UPS", 1)
    gateway.reply = breaking_off(100)
    (item,) = function.infer(request(deadline_s=600))["items"]
    assert item["error"]["code"] == "gateway_unreachable"
    assert "breaks off" in item["error"]["message"]
    assert len(gateway.asked) == 2


def self_signed(path: Path) -> Path:
    """A certificate of 127.0.0.1, its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, path.stem)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + secret)
    return path


def test_the_gateways_certificate_is_checked_and_trouble_with_it_is_said_at_once(
    site: dict[str, Any], tmp_path: Path
) -> None:
    own, other = self_signed(tmp_path / "own.pem"), self_signed(tmp_path / "other.pem")
    server = Gateway(own)
    try:
        write_site(tmp_path, site | {"url": server.url, "ca": str(own)})
        assert function.infer(request())["items"][0]["status"] == 200
        write_site(tmp_path, site | {"url": server.url, "ca": str(other)})
        answer = function.infer(request(deadline_s=600))
        assert answer["items"][0]["error"]["code"] == "endpoint_misconfigured"
        assert "self-signed" in answer["items"][0]["error"]["message"]
        assert answer["seconds"] < function.UNREACHABLE_S
        (tmp_path / "empty.pem").touch()
        for unreadable in ("none.pem", "empty.pem", "."):
            write_site(tmp_path, site | {"url": server.url, "ca": str(tmp_path / unreadable)})
            assert error_of(function.infer(request())) == "endpoint_misconfigured"
    finally:
        server.close()


def test_a_certificate_of_another_name_gets_no_key(site: dict[str, Any], tmp_path: Path) -> None:
    own = self_signed(tmp_path / "own.pem")
    server = Gateway(own)
    try:
        write_site(tmp_path, site | {"url": server.url.replace("127.0.0.1", "localhost"), "ca": str(own)})
        (item,) = function.infer(request(deadline_s=600))["items"]
    finally:
        server.close()
    assert item["error"]["code"] == "endpoint_misconfigured"
    assert "localhost" in item["error"]["message"]
    assert server.asked == []


def test_tls_where_there_is_none_is_the_sites_mistake(
    site: dict[str, Any], gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function, "UNREACHABLE_S", 0.3)
    write_site(tmp_path, site | {"url": gateway.url.replace("http:", "https:")})
    (item,) = function.infer(request(deadline_s=600))["items"]
    assert item["error"]["code"] == "endpoint_misconfigured"


def test_what_nobody_foresaw_is_an_answer_without_contents(site: dict[str, Any], gateway: Gateway) -> None:
    odd = {"error": {"message": "m", "code": "unavailable", "retry_after_s": "soon"}}
    gateway.reply = lambda body: (200, {}, {}) if body["messages"][0]["content"] == "fine" else (503, odd, {})
    answer = function.infer(request(chat("private words"), chat("fine"), deadline_s=600))
    assert [item["status"] for item in answer["items"]] == [500, 200]
    assert answer["items"][0]["error"]["code"] == "internal_error"
    assert answer["seconds"] < 60, "not at the deadline"
    assert "soon" not in json.dumps(answer)
    asked = request(chat("private words"))
    function.infer(asked)
    newest = max(Path(f"{site['answers']}-{os.getuid()}").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    newest.write_text('{"private": "words"}\n')  # somebody's hand
    refused = function.infer(asked)
    assert error_of(refused) == "internal_error"
    assert "private" not in json.dumps(refused)
    newest.unlink()
    newest.symlink_to("elsewhere")
    assert function.infer(asked)["repeated"] is False, "answered, and kept nowhere"
    assert not (newest.parent / "elsewhere").exists()


def test_a_thread_that_is_late_writes_into_no_other_file(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "kept", os.O_RDWR | os.O_CREAT)
    folder = os.open(tmp_path, os.O_RDONLY)
    store = function.Store(descriptor, folder, "digest")
    store.close()
    store.append(0, {"status": 200, "body": {}})
    os.close(descriptor)
    os.close(folder)
    assert (tmp_path / "kept").read_text() == '{"digest": "digest"}\n'


def test_an_answer_over_the_limit_is_an_error_of_that_item(
    site: dict[str, Any], gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function, "RESULT_BYTES", 20_000)
    gateway.reply = lambda body: (200, {"text": "x" * int(body["messages"][0]["content"])}, {})
    answer = function.infer(request(chat("100"), chat("30000"), chat("12000"), chat("11000")))
    assert [item["status"] for item in answer["items"]] == [200, 413, 200, 413]
    assert answer["items"][1]["error"]["code"] == "result_too_large"
    assert len(json.dumps(answer)) < 20_000


def test_what_does_not_fit_together_is_what_is_far_larger_and_then_the_last_ones() -> None:
    answers = [
        {"status": 200, "body": {"text": "x" * size}} for size in (900, 1000, 90_000, 1100, 1000, 950, 900, 1000)
    ]
    function.fit(answers, 5_500)
    assert [answer["status"] for answer in answers] == [200, 200, 413, 200, 200, 413, 413, 413]
    assert len(json.dumps(answers)) < 5_500


def test_small_answers_are_kept_where_large_ones_do_not_fit_together() -> None:
    answers = [{"status": 200, "body": {"text": "x" * size}} for size in (5000, 6000, 400)]
    function.fit(answers, 7_000)
    assert [answer["status"] for answer in answers] == [200, 413, 200]


# --- idempotency ---
def test_the_same_key_is_answered_from_what_was_kept(site: dict[str, Any], gateway: Gateway) -> None:
    asked = request(chat("a"), chat("b"))
    first = function.infer(asked)
    again = function.infer(asked | {"deadline_s": 3, "wait": False})
    assert again["repeated"] is True
    assert again["items"] == first["items"]
    assert len(gateway.asked) == 2
    assert error_of(function.infer(asked | {"items": [chat("other")]})) == "key_reused"


def test_only_what_failed_in_passing_is_asked_again(site: dict[str, Any], gateway: Gateway) -> None:
    gateway.reply = lambda body: (
        (200, {}, {}) if body["messages"][0]["content"] == "a" else (503, {"error": {"code": "no_room"}}, {})
    )
    asked = request(chat("a"), chat("b"))
    function.infer(asked)
    gateway.reply = lambda body: (200, {}, {})
    again = function.infer(asked)
    assert [item["status"] for item in again["items"]] == [200, 200]
    assert again["repeated"] is False
    assert [body["messages"][0]["content"] for _, _, body in gateway.asked[2:]] == ["b"]


def test_a_pack_whose_worker_was_killed_goes_on_where_it_was(site: dict[str, Any], gateway: Gateway) -> None:
    asked = request(chat("a"), chat("b"))
    function.infer(asked)
    (kept,) = Path(f"{site['answers']}-{os.getuid()}").glob("*.jsonl")
    assert kept.stat().st_mode & 0o777 == 0o600
    lines = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(lines[0] + lines[1] + lines[2][:10])  # in the middle of a line
    gateway.asked.clear()
    assert [item["status"] for item in function.infer(asked)["items"]] == [200, 200]
    assert len(gateway.asked) == 1


def test_a_second_one_waits_for_the_first(site: dict[str, Any], gateway: Gateway) -> None:
    begun, released = threading.Event(), threading.Event()

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        begun.set()
        released.wait(60)
        return 200, {}, {}

    gateway.reply = reply
    asked = request()
    answers: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: answers.append(function.infer(asked))) for _ in range(2)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    assert error_of(function.infer(asked | {"deadline_s": 0.2})) == "still_running"
    released.set()
    for thread in threads:
        thread.join(60)
    assert sorted(answer["repeated"] for answer in answers) == [False, True]
    assert len(gateway.asked) == 1


def test_what_one_caller_was_answered_is_not_anothers(
    site: dict[str, Any], gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request()
    function.infer(asked)
    monkeypatch.setenv(function.CALLER_VARIABLE, "another")
    assert function.infer(asked)["repeated"] is False
    assert len(gateway.asked) == 2


def test_answers_are_forgotten_after_an_hour_and_when_there_are_too_many(tmp_path: Path) -> None:
    now = time.time()
    for number, age_s in enumerate((4000, 300, 200, 100)):
        path = kept_file(tmp_path, number)
        with path.open("wb") as stream:
            stream.truncate(100_000_000)
        os.utime(path, (now - age_s, now - age_s))
    (tmp_path / "of-somebody-else.jsonl").touch()
    os.utime(tmp_path / "of-somebody-else.jsonl", (0, 0))
    function.forget(str(tmp_path), now)
    assert sorted(tmp_path.glob("*.jsonl")) == [
        kept_file(tmp_path, 2), kept_file(tmp_path, 3), tmp_path / "of-somebody-else.jsonl",
    ]  # fmt: skip
    function.forget(str(tmp_path))
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["of-somebody-else.jsonl"]


def kept_file(folder: Path, number: int) -> Path:
    return folder / f"{number:064x}.jsonl"


def test_what_is_kept_is_removed_in_time_without_another_request(
    site: dict[str, Any], gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function, "SWEEP_S", 0.02)
    for _ in range(3):
        function.infer(request())
    folder = Path(function.answers_folder(site))
    first, second, third = folder.glob("*.jsonl")
    os.utime(first, (time.time() - 3601,) * 2)
    os.utime(second, (time.time() - 3500,) * 2)
    wait_for(lambda: not first.exists(), 10, "a sweep")
    assert sorted(folder.glob("*.jsonl")) == sorted([second, third])
    assert [thread.name for thread in threading.enumerate()].count(f"answers {folder}") == 1


def test_asking_again_does_not_keep_it_for_longer(site: dict[str, Any], gateway: Gateway) -> None:
    asked = request()
    function.infer(asked)
    (kept,) = Path(function.answers_folder(site)).glob("*.jsonl")
    os.utime(kept, (time.time() - 3000,) * 2)
    before = kept.stat().st_mtime
    assert function.infer(asked)["repeated"] is True
    assert kept.stat().st_mtime == before


def on_disk(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).iterdir())


def test_one_pack_keeps_no_more_than_its_share(site: dict[str, Any]) -> None:
    answer = {"status": 200, "body": {"text": "x" * 1_000_000}}
    asked = request()
    with function.opened_answers(site, PERSON, asked, time.monotonic() + 10) as store:
        for index in range(100):
            store.append(index, answer)
    assert 10_000_000 < on_disk(function.answers_folder(site)) < function.KEPT_PACK_BYTES + 1000
    with function.opened_answers(site, PERSON, asked, time.monotonic() + 10) as store:
        assert sorted(store.found) == list(range(18)), "the first ones; the others are asked for again"


def test_all_packs_of_a_user_at_once_keep_no_more_than_the_limit(
    site: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function, "KEPT_BYTES", 200_000)
    monkeypatch.setattr(function, "KEPT_PACK_BYTES", 50_000)
    answer = {"status": 200, "body": {"text": "x" * 1000}}
    together = threading.Barrier(8, timeout=60)

    def pack() -> None:
        with function.opened_answers(site, PERSON, request(), time.monotonic() + 10) as store:
            together.wait()
            for index in range(100):
                store.append(index, answer)
            together.wait()  # none is pruned while it is in use

    threads = [threading.Thread(target=pack) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert 100_000 < on_disk(function.answers_folder(site)) <= 200_000
    with function.opened_answers(site, PERSON, request(), time.monotonic() + 10) as store:
        store.append(0, answer)
    assert on_disk(function.answers_folder(site)) <= 150_000 + 2000, "the oldest went, so that the next has room"


def test_a_pack_without_room_for_its_first_line_keeps_nothing(
    site: dict[str, Any], gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function, "KEPT_BYTES", 10)
    asked = request()
    assert [function.infer(asked)["repeated"] for _ in range(2)] == [False, False]
    assert len(gateway.asked) == 2


def test_answers_that_will_not_fit_are_let_go_while_the_pack_is_worked_on(
    site: dict[str, Any], gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    fit = function.fit

    def watched(answers: list[dict[str, Any]], limit_bytes: int) -> int:
        held.append(sum(len(json.dumps(answer)) for answer in answers))
        return fit(answers, limit_bytes)

    monkeypatch.setattr(function, "fit", watched)
    monkeypatch.setattr(function, "RESULT_BYTES", 20_000)
    monkeypatch.setattr(function, "HELD_BYTES", 40_000)
    gateway.reply = lambda body: (200, {"text": "x" * 4000}, {})
    answer = function.infer(request(*(chat(str(number)) for number in range(60))))
    assert max(held) < 40_000 + 5000, "60 of them are 240 kB"
    assert [item["status"] for item in answer["items"]].count(200) == 2
    assert {item["status"] for item in answer["items"]} == {200, 413}


def test_tasks_are_counted(site: dict[str, Any]) -> None:
    for _ in range(3):
        function.infer(request())
    assert Path(f"{site['answers']}-{os.getuid()}/tally").stat().st_size == 3


# --- the site's own files ---
def test_a_key_that_others_can_read_is_not_used(site: dict[str, Any], gateway: Gateway, tmp_path: Path) -> None:
    key = Path(site["key_file"])
    key.chmod(0o640)
    assert error_of(function.infer(request())) == "endpoint_misconfigured"
    key.chmod(0o600)
    link = tmp_path / "link.key"
    link.symlink_to(key)
    for other in (str(link), str(tmp_path / "none"), str(tmp_path)):
        write_site(tmp_path, site | {"key_file": other})
        assert error_of(function.infer(request())) == "endpoint_misconfigured"
    assert gateway.asked == []


def test_answers_lie_below_the_users_own_state_home(
    site: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o002)
    try:
        write_site(tmp_path, site | {"answers": "gateway-plugin/gw-1234"})
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
        function.infer(request())
        monkeypatch.setenv("XDG_STATE_HOME", "relative")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        function.infer(request())
    finally:
        assert os.umask(before) == 0o002, "as it was"
    for home in (tmp_path / "xdg", tmp_path / "home/.local/state"):
        (kept,) = home.glob(f"gateway-plugin/gw-1234-{os.getuid()}/*.jsonl")
        modes = [path.stat().st_mode & 0o777 for path in (kept, kept.parent, kept.parents[1], home)]
        assert modes == [0o600, 0o700, 0o700, 0o700]
    assert (tmp_path / "home/.local").stat().st_mode & 0o777 == 0o700
    assert not Path("relative").exists()


def taken_by_a_link(folder: Path) -> None:
    (folder.parent / "target").mkdir()
    folder.symlink_to(folder.parent / "target")


def taken_by_a_file(folder: Path) -> None:
    folder.touch()


def taken_by_another_user(folder: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root makes a folder for another user")
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    folder.chmod(0o777)


@pytest.mark.parametrize("take", [taken_by_a_link, taken_by_a_file, taken_by_another_user])
def test_a_folder_for_answers_that_somebody_else_took_shuts_nobody_out_and_gets_nothing(
    site: dict[str, Any], gateway: Gateway, tmp_path: Path, take: Callable[[Path], None]
) -> None:
    folder = Path(function.answers_folder(site))
    take(folder)
    asked = request()
    assert [function.infer(asked)["items"][0]["status"] for _ in range(2)] == [200, 200]
    assert len(gateway.asked) == 2, "nothing was kept"
    assert list(folder.glob("*")) == []


def test_a_folder_for_answers_that_others_can_read_is_closed(site: dict[str, Any]) -> None:
    folder = Path(function.answers_folder(site))
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    function.infer(request())
    assert folder.stat().st_mode & 0o777 == 0o700


def test_without_a_site_file_nothing_is_done(site: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(function.SITE_VARIABLE)
    assert error_of(function.infer(request())) == "endpoint_misconfigured"


# --- files for input ---
def write_input(folder: Path, name: str, count: int) -> str:
    text = "".join(json.dumps(chat(str(number))) + "\n" for number in range(count))
    (folder / "input" / name).write_text(text)
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_range_of_lines_of_a_file(site: dict[str, Any], gateway: Gateway, tmp_path: Path) -> None:
    (tmp_path / "input/jobs").mkdir()
    digest = write_input(tmp_path, "jobs/prompts.jsonl", 10)
    given = {"path": "jobs/prompts.jsonl", "sha256": digest, "start": 3, "count": 4}
    answer = function.infer(request(input=given))
    texts = [item["body"]["echo"]["messages"][0]["content"] for item in answer["items"]]
    assert texts == ["3", "4", "5", "6"]
    assert error_of(function.infer(request(input=given | {"count": 8}))) == "invalid_request"
    assert error_of(function.infer(request(input=given | {"sha256": "0" * 64}))) == "checksum_mismatch"
    assert error_of(function.infer(request(input=given | {"url": "x"}))) == "unknown_option"
    assert error_of(function.infer(request(input=given | {"start": -1}))) == "invalid_request"


def test_lines_that_are_too_long_by_themselves_and_together_are_told_apart(
    site: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = write_input(tmp_path, "prompts.jsonl", 10)
    given = {"path": "prompts.jsonl", "sha256": digest, "start": 0, "count": 10}
    longest = max(len(line) for line in (tmp_path / "input/prompts.jsonl").read_bytes().splitlines(keepends=True))
    monkeypatch.setattr(function, "INPUT_BYTES", 5 * longest)
    assert error_of(function.infer(request(input=given))) == "pack_too_large"
    assert len(function.infer(request(input=given | {"count": 5}))["items"]) == 5
    monkeypatch.setattr(function, "LINE_BYTES", longest - 1)
    assert error_of(function.infer(request(input=given | {"count": 5}))) == "input_too_large"


def test_nothing_outside_the_folder_is_read(site: dict[str, Any], gateway: Gateway, tmp_path: Path) -> None:
    digest = write_input(tmp_path, "good.jsonl", 1)
    outside = tmp_path / "outside.jsonl"
    outside.write_text((tmp_path / "input/good.jsonl").read_text())
    (tmp_path / "input/link.jsonl").symlink_to(outside)
    (tmp_path / "input/folder").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "input/pipe")
    for path in (
        "../outside.jsonl", str(outside), "link.jsonl", "folder/outside.jsonl", "./good.jsonl", "", "none", "pipe",
        "good.jsonl/x", "a\0b", "~/x",
    ):  # fmt: skip
        given = {"path": path, "sha256": digest, "start": 0, "count": 1}
        assert error_of(function.infer(request(input=given))) == "input_not_allowed", path
    assert gateway.asked == []


def test_a_refused_input_leaves_no_descriptor_open(site: dict[str, Any], tmp_path: Path) -> None:
    digest = write_input(tmp_path, "good.jsonl", 1)
    (tmp_path / "input/folder").mkdir()
    os.mkfifo(tmp_path / "input/pipe")
    for path in ("none", "none/x", "folder/none", "good.jsonl/x", "pipe", "good.jsonl", "folder"):
        for sha256, start in ((digest, 10), ("0" * 64, 0)):
            given = {"path": path, "sha256": sha256, "start": start, "count": 1}
            with pytest.raises(function.Refusal):
                function.read_input(site, given)
    opened = (os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink())
    assert not [path for path in opened if path.startswith(f"{tmp_path}")]


def test_reading_a_file_ends_with_the_packs_deadline(site: dict[str, Any], tmp_path: Path) -> None:
    digest = write_input(tmp_path, "good.jsonl", 1000)
    given = {"path": "good.jsonl", "sha256": digest, "start": 0, "count": 1}
    assert len(function.read_input(site, given, time.monotonic() + 10)) == 1
    with pytest.raises(function.Refusal) as caught:
        function.read_input(site, given, time.monotonic() - 1)
    assert caught.value.error["code"] == "deadline"
    assert error_of(function.infer(request(input=given, deadline_s=1e-9))) == "deadline"


def test_a_file_that_is_too_large_is_not_read(
    site: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "input/huge.jsonl"
    with path.open("wb") as stream:
        stream.truncate(10**12)  # has holes: no disk is that large here
    given = {"path": "huge.jsonl", "sha256": "0" * 64, "start": 0, "count": 1}
    assert error_of(function.infer(request(input=given))) == "input_too_large"
    digest = write_input(tmp_path, "good.jsonl", 100)
    size = (tmp_path / "input/good.jsonl").stat().st_size
    monkeypatch.setattr(function, "FILE_BYTES", size)
    whole = given | {"path": "good.jsonl", "sha256": digest}
    assert len(function.infer(request(input=whole))["items"]) == 1
    monkeypatch.setattr(os, "fstat", lambda _: os.stat_result((0o100600, *(0,) * 5, 10, 0, 0, 0)))
    monkeypatch.setattr(function, "FILE_BYTES", size - 1)
    with pytest.raises(function.Refusal, match="grows"):
        function.read_input(site, whole)


def test_a_range_behind_the_end_is_refused_before_all_is_read(site: dict[str, Any], tmp_path: Path) -> None:
    write_input(tmp_path, "good.jsonl", 10)
    given = {"path": "good.jsonl", "sha256": "0" * 64, "start": 10**12, "count": 1}
    assert error_of(function.infer(request(input=given))) == "invalid_request", "and not checksum_mismatch"


def test_a_line_that_is_no_request_is_named(site: dict[str, Any], tmp_path: Path) -> None:
    for text, code in (("{", "invalid_request"), ('{"path": "/sleep", "body": {}}', "path_not_allowed")):
        (tmp_path / "input/bad.jsonl").write_text(text + "\n")
        digest = hashlib.sha256((text + "\n").encode()).hexdigest()
        given = {"path": "bad.jsonl", "sha256": digest, "start": 0, "count": 1}
        answer = function.infer(request(input=given))
        assert error_of(answer) == code
        assert "line 0" in answer["error"]["message"]


def test_an_endpoint_without_a_folder_reads_no_files(site: dict[str, Any], tmp_path: Path) -> None:
    digest = write_input(tmp_path, "good.jsonl", 1)
    write_site(tmp_path, {name: value for name, value in site.items() if name != "input_folder"})
    given = {"path": "good.jsonl", "sha256": digest, "start": 0, "count": 1}
    assert error_of(function.infer(request(input=given))) == "no_input_folder"
