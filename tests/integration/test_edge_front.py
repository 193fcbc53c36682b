"""The front door with hostile input: every rule of the design's Security that it holds, and somebody who tries it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import pytest

from gateway_plugin.edge.keys import KeyStore
from gateway_plugin.site import Limits
from tests.support.edges import Edge, FakeEngine, chat, running_edge, until

pytestmark = pytest.mark.integration

BODY = json.dumps(chat("tiny", "hello")).encode()


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge(Limits(body_bytes=1 << 20)) as running:
        yield running


@pytest.fixture
async def engine(edge: Edge) -> FakeEngine:
    return await edge.add_engine("tiny")


def post(path: str, *headers: str, body: bytes = BODY, method: str = "POST", version: str = "1.1") -> bytes:
    """A request as somebody writes it who does not care for rules."""
    lines = [f"{method} {path} HTTP/{version}", "host: edge", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


async def test_exactly_one_credential(edge: Edge, engine: FakeEngine) -> None:
    key, other = edge.user_key, edge.admin_key
    good: list[tuple[str, ...]] = [
        (f"authorization: Bearer {key}",),
        (f"Authorization: bearer {key}",),
        (f"AUTHORIZATION: BEARER  {key}",),
        (f"x-api-key: {key}",),
        (f"authorization: Bearer {key}", f"x-api-key: {key}"),
    ]
    bad: list[tuple[str, ...]] = [
        (),
        ("authorization: Bearer",),
        ("authorization: Bearer ",),
        ("authorization: Bearer gw-wrong",),
        (f"authorization: {key}",),
        (f"authorization: Basic {key}",),
        (f"authorization: Bearer {key} {key}",),
        (f"authorization: Bearer {key},Bearer {other}",),
        (f"authorization: Bearer {key}, {other}",),
        (f"authorization: Bearer {key}", f"authorization: Bearer {key}"),
        (f"authorization: Bearer {key}", f"x-api-key: {other}"),
        ("authorization: Bearer wrong", f"x-api-key: {key}"),
        (f"authorization: Bearer {key}", "x-api-key: wrong"),
        ("authorization: Bearer wrong", "x-api-key: wrong"),
        (f"authorization: Bearer {key}", "x-api-key: "),
        (f"authorization: Basic {key}", f"x-api-key: {key}"),
        (f"authorization: Bearer {key}", f"x-api-key: {key}", f"x-api-key: {key}"),
        (f"authorization: Bearer {key}", f"authorization: Bearer {other}", f"x-api-key: {key}"),
        (f"authorization: Bearer {key}", f"x-api-key: {key},{key}"),
        (f"x-api-key: {key}", "x-api-key: wrong"),
        (f"x-api-key: {key},{key}",),
        (f"x-api-key: Bearer {key}",),
        (f"x-api-key: {key}x",),
        ("x-api-key: ",),
        (f"proxy-authorization: Bearer {key}",),
        (f"cookie: authorization=Bearer {key}",),
    ]
    for headers in good:
        status, text = await edge.raw(post("/v1/chat/completions", *headers))
        assert status == 200, (headers, text)
    for headers in bad:
        status, text = await edge.raw(post("/v1/chat/completions", *headers))
        assert status == 401, (headers, text)
        assert "WWW-Authenticate: Bearer" in text or "www-authenticate: Bearer" in text
        assert json.loads(text.partition("\r\n\r\n")[2])["error"]["code"] == "invalid_api_key"
    assert len(engine.seen()) == len(good)
    assert edge.cold == []


async def test_paths_that_are_nobodys_business(edge: Edge, engine: FakeEngine) -> None:
    with_key = f"authorization: Bearer {edge.admin_key}"
    for path in (
        "/sleep", "/wake_up", "/collective_rpc", "/invocations", "/v1/load_lora_adapter", "/inference/v1/generate",
        "/is_sleeping", "/sleep?level=2", "/reset_prefix_cache", "/pause", "/resume", "/start_profile", "/slowdown",
        "/v1/audio/voices", "/v1/unload_lora_adapter", "/adapters",
        "/v1/responses/resp_1", "/v1/chat/completions/batch", "/server_info", "/",
        "//v1/chat/completions", "/v1//chat/completions", "/v1/chat/completions/", "/v1/chat/completions;a=b",
        "/v1/../sleep", "/v1/chat/completions/../../sleep", "/./v1/chat/completions", "/v1/chat/completion%73",
        "/%76%31/chat/completions", "/v1%2fchat/completions", "/V1/CHAT/COMPLETIONS", "/v1/chat/completions%00",
        "/v1/chat/completions%20", "/v1\\chat\\completions", "/gateway/v1/../../sleep", "/gateway/v1/models/../status",
        "/gateway/v1", "/gateway/v1/", "/gateway/v1//status", "/gateway/v1/status%2f..", "/gateway/v2/status",
    ):  # fmt: skip
        status, text = await edge.raw(post(path, with_key))
        assert status in (404, 405), (path, text)
    for path in ("/v1/models/a/../../../gateway/v1/status", "/v1/models/%2e%2e/x", "/v1/models/a%0d%0ax", "/metrics/x"):
        status, text = await edge.raw(f"GET {path} HTTP/1.1\r\nhost: e\r\n{with_key}\r\n\r\n".encode())
        assert status == 404, (path, text)
    for path in ("/is_sleeping", "/server_info?config_format=json", "/is_paused", "/v1/models/a/../../is_sleeping"):
        status, text = await edge.raw(f"GET {path} HTTP/1.1\r\nhost: e\r\n{with_key}\r\n\r\n".encode())
        assert status == 404, (path, text)
    for target in ("http://edge/v1/chat/completions", "http://evil/sleep", "edge:443", "*"):
        status, text = await edge.raw(post(target, with_key, method="POST"))
        assert status == 400, (target, text)
    assert (await edge.raw(post("edge:443", with_key, method="CONNECT", body=b"")))[0] in (400, 404, 405)
    assert engine.seen() == []
    assert edge.cold == []


async def test_methods(edge: Edge, engine: FakeEngine) -> None:
    with_key = f"authorization: Bearer {edge.admin_key}"
    for method, path in (
        ("GET", "/v1/chat/completions"),
        ("PUT", "/v1/chat/completions"),
        ("HEAD", "/v1/chat/completions"),
        ("OPTIONS", "/v1/chat/completions"),
        ("POST", "/v1/models"),
        ("DELETE", "/v1/models/tiny"),
        ("DELETE", "/gateway/v1/blocks"),
        ("POST", "/metrics"),
        ("POST", "/health"),
    ):
        status, text = await edge.raw(post(path, with_key, "connection: close", method=method, body=b""))
        assert status == 405, (method, path, text)
    status, text = await edge.raw(post("/v1/models", with_key, method="GET", body=b"x"))
    assert status == 400, text
    status, text = await edge.raw(
        b"GET /ready HTTP/1.1\r\nhost: e\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
    )
    assert status == 400, text
    assert engine.seen() == []
    assert edge.cold == []


async def test_query_strings_pass_and_bytes_are_untouched(edge: Edge, engine: FakeEngine) -> None:
    odd = b'{ "messages":[{"role":"user","content":"\xc3\xa4  \\u00e4"}],\n"model" : "tiny" }'
    status, text = await edge.raw(
        post("/v1/chat/completions?beta=true&x=%2F..%2F", f"x-api-key: {edge.user_key}", body=odd)
    )
    assert status == 200, text
    seen = engine.seen()[0]
    assert seen["path"] == "/v1/chat/completions?beta=true&x=%2F..%2F"
    assert seen["bytes"] == len(odd)


async def test_what_callers_say_about_themselves_is_forgotten(edge: Edge, engine: FakeEngine) -> None:
    lies = [
        "x-gateway-role: admin", "X-Gateway-Role: admin", "x-gateway-key: root", "x-gateway-stamp: 1",
        "x-gateway-edge: guess", "x-gateway-request: mine", "x-gateway-anything: at all", "x-gateway-not-routed: 1",
    ]  # fmt: skip
    for model in ("tiny", "unknown"):
        body = json.dumps(chat(model, "hello")).encode()
        status, text = await edge.raw(post("/v1/chat/completions", f"x-api-key: {edge.user_key}", *lies, body=body))
        assert status == 200, text
    warm = dict(engine.seen()[0]["headers"])
    cold = dict(edge.cold[0].headers)
    assert edge.cold[0].header("x-gateway-model") == "unknown"
    ours = {"x-gateway-model", "x-gateway-request", "x-gateway-arrived", "x-gateway-tag"}
    for headers, more in ((warm, set()), (cold, {"x-gateway-edge"})):
        assert headers["x-gateway-request"] not in ("mine", "")
        assert headers.get("x-gateway-edge") != "guess"
        assert {name for name in headers if name.startswith("x-gateway-")} == ours | more
        assert "x-api-key" not in headers
    assert (await edge.raw(f"GET /v1/models HTTP/1.1\r\nhost: e\r\nx-api-key: {edge.user_key}\r\n\r\n".encode()))[
        0
    ] == 200
    listed = edge.cold[1]
    assert (listed.header("x-gateway-key"), listed.header("x-gateway-role")) == ("ann", "user")
    names = [name for name, _ in edge.cold[0].headers]
    assert len(names) == len(set(names))


async def test_no_secret_reaches_an_engine_and_no_engine_key_the_ingress(edge: Edge, engine: FakeEngine) -> None:
    for header in (f"x-api-key: {edge.user_key}", f"authorization: Bearer {edge.user_key}"):
        assert (await edge.raw(post("/v1/chat/completions", header)))[0] == 200
        cold = json.dumps(chat("unknown", "x")).encode()
        assert (await edge.raw(post("/v1/chat/completions", header, body=cold)))[0] == 200
    engine.kill()
    assert (await edge.raw(post("/v1/chat/completions", f"x-api-key: {edge.user_key}")))[
        0
    ] == 200  # through the cold door
    secret = edge.layout.edge_secret.read_text()
    at_engine = json.dumps([seen["headers"] for seen in engine.seen()])
    assert edge.user_key not in at_engine
    assert secret not in at_engine
    assert f"Bearer {edge.runtime.slot_key(0)}" in at_engine
    assert len(edge.cold) == 3
    for request in edge.cold:
        assert request.header("x-gateway-edge") == secret
        said = json.dumps(request.headers)
        assert edge.user_key not in said
        assert edge.runtime.slot_key(0) not in said


async def test_roles(edge: Edge) -> None:
    async with edge.client() as user, edge.client(edge.admin_key) as admin:
        for path in ("/metrics", "/metrics/edge", "/gateway/v1/status", "/gateway/v1/blocks"):
            refused = await user.get(path)
            assert refused.status_code == 403, path
            assert refused.json()["error"]["code"] == "forbidden"
            assert (await admin.get(path)).status_code == 200, path
        assert (await user.post("/gateway/v1/models/load", json={"model": "tiny"})).status_code == 403
        assert (await admin.post("/gateway/v1/models/load", json={"model": "tiny"})).status_code == 200
        assert (await user.get("/v1/models")).status_code == 200
        for name in ("tiny", "org/tiny:1@x", "org%2Ftiny"):
            assert (await user.get(f"/v1/models/{name}")).status_code == 200, name
        assert "haproxy_server_" in (await admin.get("/metrics/edge")).text
    async with edge.client("") as nobody:
        assert (await nobody.get("/health")).json() == {"status": "ok"}
        assert (await nobody.get("/ready", headers={"x-gateway-role": "admin"})).json()["cold"] is True
        assert edge.cold[-1].header("x-gateway-role") == ""
        for path in ("/v1/models", "/metrics", "/metrics/edge", "/gateway/v1/status"):
            assert (await nobody.get(path)).status_code == 401


async def test_refused_before_the_body_is_awaited(edge: Edge, engine: FakeEngine) -> None:
    """A caller without a key announces a megabyte and sends none of it: the refusal does not wait."""
    begin = time.monotonic()
    head = post("/v1/chat/completions", body=b"").replace(b"content-length: 0", b"content-length: 1000000")
    status, _ = await edge.raw(head)
    assert status == 401
    status, text = await edge.raw(head.replace(b"\r\n\r\n", b"\r\ntransfer-encoding: chunked\r\n\r\n"))
    assert status in (400, 401), text
    with_key = post("/v1/chat/completions", f"x-api-key: {edge.user_key}", body=b"")
    status, text = await edge.raw(with_key.replace(b"content-length: 0", b"content-length: 1048577"))
    assert status == 413
    assert "1048576 bytes" in text
    assert time.monotonic() - begin < 15, "the edge waits longer for a body"
    status, _ = await edge.raw(with_key.replace(b"content-length: 0", b"content-length: 100") + b"{", within_s=1.0)
    assert status == 0, "with a key it is awaited"


async def test_a_refusal_is_readable_for_a_client_that_sends_all_of_its_body_first(edge: Edge) -> None:
    async with edge.client("gw-wrong") as stranger, edge.client() as ann:
        for _ in range(10):
            assert (await stranger.post("/v1/completions", content=b"x" * 900_000)).status_code == 401
            assert (await ann.post("/nothing", content=b"x" * 900_000)).status_code == 404
            refused = await ann.post("/v1/completions", content=b"x" * 3_000_000)
            assert refused.status_code == 413
            assert refused.json()["error"]["code"] == "body_too_large"
    assert edge.cold == []


async def test_which_model_a_body_names(edge: Edge, engine: FakeEngine) -> None:
    decoy = '"model": "other", {"model":"other"}'
    first = json.dumps({"messages": [{"role": "user", "content": decoy, "model": "other"}], "model": "tiny"})
    assert (await edge.ask("tiny", decoy)).json()["model"] == "tiny"
    async with edge.client() as client:
        assert (await client.post("/v1/chat/completions", content=first)).json()["model"] == "tiny"
        for body in (
            "", "no json", "[]", "null", '{"model":', '{"model":["tiny"]}', '{"model":{"a":"tiny"}}', '{"model":5}',
            '{"x":{"model":"tiny"}}', '[{"model":"tiny"}]', '{"model":"tiny;drop"}', '{"model":""}', '{"model":null}',
            json.dumps({"model": "tiny\n"}), json.dumps({"model": "tiny\r\nx-gateway-role: admin"}),
            json.dumps({"model": "tiny\x00"}), json.dumps({"model": "t" * 500}), json.dumps({"model": "Tiny"}),
            json.dumps({"model": "..//"}), json.dumps({"model": " tiny"}), '\ufeff{"model":"tiny"}',
        ):  # fmt: skip
            before = len(edge.cold)
            answer = await client.post("/v1/chat/completions", content=body.encode())
            assert answer.json().get("cold"), body
            assert len(edge.cold) == before + 1
            said = edge.cold[-1]
            assert said.header("x-gateway-role") == "", body
            assert said.header("x-gateway-model") in ("", "Tiny"), body
            assert said.body == body.encode()
    assert len(engine.seen()) == 2


async def test_bodies_past_the_buffer(edge: Edge, engine: FakeEngine) -> None:
    long = "x" * 300_000
    async with edge.client() as client:
        model_last = json.dumps({"messages": [{"role": "user", "content": long}], "model": "tiny"})
        answer = await client.post("/v1/chat/completions", content=model_last)
        assert answer.json() == {"cold": True, "bytes": len(model_last), "path": "/v1/chat/completions"}
        assert edge.cold[-1].header("x-gateway-model") == ""
        named = await client.post("/v1/chat/completions", content=model_last, headers={"x-gateway-model": "tiny"})
        assert named.json()["model"] == "tiny"
        model_first = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": long}]})
        assert (await client.post("/v1/chat/completions", content=model_first)).json()["model"] == "tiny"

        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(model_first), 50_000):
                yield model_first[start : start + 50_000].encode()

        # Its length is not known before its end: only the ingress can hold it to the limit.
        assert (await client.post("/v1/chat/completions", content=chunks())).json()["cold"] is True

        async def small() -> AsyncIterator[bytes]:
            for byte in BODY:
                yield bytes((byte,))

        assert (await client.post("/v1/chat/completions", content=small())).json()["model"] == "tiny"
        for name in ("ti;ny", "5", "tiny tiny", "tiny,tiny", "x" * 129):
            refused = await client.post("/v1/chat/completions", content=BODY, headers={"x-gateway-model": name})
            assert refused.status_code == 400, name
        twice = [("x-gateway-model", "tiny"), ("x-gateway-model", "tiny")]
        assert (await client.post("/v1/chat/completions", content=BODY, headers=twice)).status_code == 400


async def test_how_long_a_client_is_ready_to_wait_goes_to_the_ingress(edge: Edge) -> None:
    async with edge.client() as client:
        for said, status in (("30", 200), ("0.5", 200), ("", 400), ("0", 400), ("0.0", 400), ("-1", 400), ("1e3", 400)):
            answer = await client.post("/v1/chat/completions", content=BODY, headers={"x-gateway-deadline-s": said})
            assert answer.status_code == status, said
            if status == 200:
                assert edge.cold[-1].header("x-gateway-deadline-s") == said
        for said, status in (
            ("0", 200),
            ("90", 200),
            ("", 400),
            ("-1", 400),
            ("1.5", 400),
            ("5, 6", 400),
            ("9" * 7, 400),
        ):
            answer = await client.post("/v1/chat/completions", content=BODY, headers={"x-gateway-wait": said})
            assert answer.status_code == status, said
            if status == 200:
                assert edge.cold[-1].header("x-gateway-wait") == said
        for header in ("x-gateway-wait", "x-gateway-deadline-s"):
            twice = [(header, "5"), (header, "6")]
            assert (await client.post("/v1/chat/completions", content=BODY, headers=twice)).status_code == 400
        await client.post("/v1/chat/completions", content=BODY)
        assert edge.cold[-1].header("x-gateway-deadline-s") == ""
        assert edge.cold[-1].header("x-gateway-wait") == ""


async def test_only_an_endpoints_key_says_for_whom_it_asks(edge: Edge) -> None:
    person = "11111111-aaaa-4444-8888-000000000001"
    key = KeyStore(edge.layout).create("globus", "endpoint")
    tries: tuple[tuple[str, list[tuple[str, str]], str], ...] = (
        (key, [("x-gateway-caller", person)], person),
        (edge.user_key, [("x-gateway-caller", person)], ""),
        (edge.admin_key, [("x-gateway-caller", person)], ""),
        (key, [], ""),
        (edge.user_key, [("x-gateway-caller", 'x","key":"ann')], ""),
    )
    for given, headers, logged in tries:
        async with edge.client(given) as client:
            assert (await client.post("/v1/chat/completions", content=BODY, headers=headers)).status_code == 200
        tag = edge.cold[-1].header("x-gateway-caller")
        assert (len(tag) == 16) == bool(logged), "only an endpoint's key may say for whom it asks"
        assert person not in tag, "the name is for the usage log alone"
    async with edge.client(key) as client:
        assert (await client.get("/gateway/v1/status")).status_code == 403, "an endpoint is no administrator"

    async def all_logged() -> bool:
        return len(edge.usage()) == len(tries) + 1

    await until(all_logged, "the usage log")
    assert [line["caller"] for line in edge.usage()[:-1]] == [believed or "-" for *_, believed in tries]
    reached = len(edge.cold)
    for wrong in (['x","key":"ann'], [person, "another"], ["x" * 65], [""]):
        async with edge.client(key) as client:
            named = [("x-gateway-caller", value) for value in wrong]
            refused = await client.post("/v1/chat/completions", content=BODY, headers=named)
        assert refused.status_code == 400, f"{wrong}: no request is done for a caller whom nobody knows"
        assert "x-gateway-caller" in refused.json()["error"]["message"]
    assert len(edge.cold) == reached


async def test_limits_of_a_key(edge: Edge) -> None:
    async with running_edge(Limits(in_flight_per_key=2, requests_per_key_10s=20)) as small:
        await small.add_engine("tiny")
        slow = [asyncio.create_task(small.ask("tiny", "@sleep=3")) for _ in range(2)]

        async def both_in_flight() -> bool:
            return sum(stat.in_flight for stat in await small.runtime.servers()) == 2

        await until(both_in_flight, "two in flight")
        refused = await small.ask("tiny", "hello")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert "2 requests in flight" in refused.json()["error"]["message"]
        async with small.client(small.admin_key) as other:
            assert (await other.get("/v1/models")).status_code == 200, "another key has its own limit"
        assert [answer.status_code for answer in await asyncio.gather(*slow)] == [200, 200]
        assert (await small.ask("tiny", "hello")).status_code == 200, "nothing is in flight any more"
        async with small.client() as client:
            answers = [await client.get("/v1/models") for _ in range(30)]
        assert answers[-1].status_code == 429
        assert "20 requests within 10 s" in answers[-1].json()["error"]["message"]
        assert answers[-1].headers["retry-after"] == "5"


async def test_every_refusal_is_json_in_openais_form(edge: Edge, engine: FakeEngine) -> None:
    key = f"x-api-key: {edge.user_key}"
    for data, wanted in (
        (post("/v1/chat/completions", key, f"x-long: {'x' * 33000}"), 400),
        (post("*", key), 400),
        (post("/v1/completions", "x-api-key: wrong"), 401),
        (post("/nothing", key), 404),
    ):
        status, text = await edge.raw(data)
        assert status == wanted, text
        error = json.loads(text.partition("\r\n\r\n")[2])["error"]
        assert set(error) >= {"message", "type", "code", "param"}
    for data in (
        b"nonsense\r\n\r\n",
        post("/v1/chat/completions", key, f"x-long: {'x' * 70000}"),
        post("/v1/chat/completions", key, *(f"x-{i}: 1" for i in range(200))),
        post("/v1/chat/completions", key, "bad header: x"),
        post("/v1/chat/completions", key, "content-length: 3"),
        post("/v1/chat/completions", key, "transfer-encoding: chunked, identity"),
    ):
        assert (await edge.raw(data))[0] == 400, data[:100]  # no HTTP: refused before any rule
    assert engine.seen() == []


async def test_an_upgrade_is_not_passed_on(edge: Edge, engine: FakeEngine) -> None:
    upgrade = ("connection: upgrade", "upgrade: websocket")
    status, text = await edge.raw(post("/v1/chat/completions", f"x-api-key: {edge.user_key}", *upgrade))
    assert status in (200, 400), text
    assert "upgrade" not in json.dumps([seen["headers"] for seen in engine.seen()]).lower()


async def test_usage_log(edge: Edge, engine: FakeEngine) -> None:
    assert (await edge.ask("tiny", "my secret prompt")).status_code == 200
    assert (await edge.ask('evil\\","key":"root', "prompt two")).status_code == 200
    status, _ = await edge.raw(post(f"/v1/{edge.user_key}?q=my+secret+prompt", f"x-api-key: {edge.user_key}"))
    assert status == 404
    await edge.raw(post("/v1/completions", "x-api-key: gw-wrong"))
    async with edge.client("") as client:
        await client.get("/health")

    async def four() -> bool:
        return len(edge.usage()) == 4

    await until(four, "four lines")
    warm, cold, lost, stranger = edge.usage()
    assert (warm["key"], warm["model"], warm["status"], warm["where"]) == ("ann", "tiny", 200, "slot0/e0")
    assert warm["path"] == "/v1/chat/completions"
    assert warm["request"] == engine_header(engine, "x-gateway-request")
    assert warm["bytes_out"] > 100
    assert 0 <= warm["first_byte_ms"] <= warm["ms"] + 1
    assert abs(warm["time"] - time.time()) < 60
    assert (cold["key"], cold["model"], cold["where"]) == ("ann", "-", "ingress/ingress")
    assert (lost["key"], lost["path"], lost["status"]) == ("ann", "-", 404)
    assert (stranger["key"], stranger["status"]) == ("-", 401)
    text = edge.layout.usage_log.read_text()
    for secret in (
        "secret",
        "prompt two",
        "gw-",
        "root",
        edge.runtime.slot_key(0),
        edge.layout.edge_secret.read_text(),
    ):
        assert secret not in text
    assert len({line["request"] for line in edge.usage()}) == 4


def engine_header(engine: FakeEngine, name: str) -> str:
    return str(dict(engine.seen()[0]["headers"])[name])
