"""HTTP as clients of all sorts speak it: each is served, or told what to do, and none of it opens anything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from tests.integration.test_edge_front import post
from tests.support.edges import Edge, FakeEngine, chat, running_edge, until

pytestmark = pytest.mark.integration

PAGE = "http://localhost:3000"
OTHER_PAGE = "https://chat.example.org"


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge(cors_origins=(PAGE, OTHER_PAGE)) as running:
        yield running


@pytest.fixture
async def engine(edge: Edge) -> FakeEngine:
    return await edge.add_engine("tiny")


def message(text: str) -> str:
    """Of a refusal in OpenAI's form."""
    error = json.loads(text.partition("\r\n\r\n")[2])["error"]
    assert set(error) >= {"message", "type", "code", "param"}
    return str(error["message"])


async def until_closed(edge: Edge, data: bytes) -> str:
    """All that comes, up to the connection's end."""
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.site.port)
        writer.write(data)
        said = await reader.read()
        writer.close()
    return said.decode("latin-1")


async def test_head_is_get_without_a_body(edge: Edge, engine: FakeEngine) -> None:
    user, admin = f"x-api-key: {edge.user_key}", f"x-api-key: {edge.admin_key}"
    for path, header, wanted in (
        ("/health", "x: 1", 200),
        ("/ready", "x: 1", 200),
        ("/v1/models", user, 200),
        ("/v1/models/tiny", user, 200),
        ("/gateway/v1/status", admin, 200),
        ("/metrics/edge", admin, 200),
        ("/v1/models", "x: 1", 401),
        ("/metrics", user, 403),
        ("/metrics/edge", user, 403),
        ("/gateway/v1/status", user, 403),
        ("/v1/chat/completions", user, 405),
        ("/sleep", user, 404),
    ):
        answer = await until_closed(
            edge, f"HEAD {path} HTTP/1.1\r\nhost: e\r\n{header}\r\nconnection: close\r\n\r\n".encode()
        )
        assert answer.startswith(f"HTTP/1.1 {wanted} "), (path, answer)
        assert answer.partition("\r\n\r\n")[2] == "", path
    with_body = post("/v1/models", user, "connection: close", method="HEAD", body=b"x")
    assert (await until_closed(edge, with_body)).startswith("HTTP/1.1 400 ")
    assert engine.seen() == []


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v1/v1/chat/completions", "twice"),
        ("/v1//chat/completions", "slash too many"),
        ("//v1/models", "slash too many"),
        ("/v1/chat/completions/", "slash at its end"),
        ("/v1/models/", "slash at its end"),
        ("/chat/completions", "'/v1' is missing (/v1/chat/completions)"),
        ("/models", "'/v1' is missing (/v1/models)"),
        ("/openai/deployments/m/chat/completions?api-version=1", "Azure"),
        ("/v1/batches", "map_file"),
        ("/v1/files", "map_file"),
        ("/v1/messages/batches", "map_file"),
        ("/v1", "the base URL itself"),
        ("/v1/", "the base URL itself"),
        ("/rerank/", "slash at its end"),
        ("/V1/chat/completions", "'/v1', in lower case"),
        ("/v1/Chat/Completions", "lower case"),
        ("/openai/v1/chat/completions", "nothing stands before '/v1'"),
        ("/api/v1/models", "nothing stands before '/v1'"),
        ("/v1/engines/m/completions", "'/v1/completions'"),
        ("/api/chat", "Ollama's API"),
        ("/v1beta/models/m:generateContent", "Google's API"),
        ("/v1/audio/voices", "Served are chat/completions"),
        ("/v1/nothing", "Served are chat/completions"),
        ("/nothing", "'/v1' at its end"),
    ],
)
async def test_a_base_url_that_is_wrong_is_told_the_right_one(edge: Edge, path: str, says: str) -> None:
    for method in ("POST", "GET"):
        body = b"{}" if method == "POST" else b""
        status, text = await edge.raw(post(path, f"x-api-key: {edge.user_key}", method=method, body=body))
        assert status == 404, (method, path, text)
        assert says in message(text)
        assert (await edge.raw(post(path, method=method, body=body)))[0] == 401, "nobody without a key is told"
    assert edge.cold == []


async def test_a_page_of_an_allowed_origin_may_ask_and_read(edge: Edge, engine: FakeEngine) -> None:
    asks = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type, x-stainless-os",
    }
    async with edge.client("") as page:
        preflight = await page.options("/v1/chat/completions", headers=asks)
        assert (preflight.status_code, preflight.content) == (204, b"")
        assert preflight.headers["access-control-allow-origin"] == PAGE
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert preflight.headers["access-control-allow-headers"] == asks["access-control-request-headers"]
        refused = await page.get("/v1/models", headers={"origin": PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
    async with edge.client() as page:
        for origin in (PAGE, OTHER_PAGE):
            warm = await page.post("/v1/chat/completions", json=chat("tiny", "hello"), headers={"origin": origin})
            lost = await page.get("/nothing", headers={"origin": origin})
            health = await page.get("/health", headers={"origin": origin})
            ready = await page.get("/ready", headers={"origin": origin})
            for answer, status in ((warm, 200), (lost, 404), (health, 200), (ready, 200)):
                assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, origin)
                assert answer.headers["vary"] == "origin"
                assert "access-control-allow-credentials" not in answer.headers
    assert {request.path for request in edge.cold} == {"/ready"}


async def test_no_other_page_may(edge: Edge, engine: FakeEngine) -> None:
    """And a preflight opens nothing: it says no more of a path than that its page may ask."""
    wants = ("access-control-request-method: POST", "access-control-request-headers: authorization")
    for origin in (
        "http://localhost:3001",
        "https://localhost:3000",
        "null",
        "*",
        PAGE + "/",
        PAGE.upper(),
        f"{PAGE}, x",
    ):
        status, text = await edge.raw(post("/v1/models", f"origin: {origin}", *wants, method="OPTIONS", body=b""))
        assert status == 401, (origin, text)
        assert "access-control-" not in text
        status, text = await edge.raw(post("/v1/chat/completions", f"origin: {origin}", f"x-api-key: {edge.user_key}"))
        assert status == 200
        assert "access-control-" not in text
    twice = (f"origin: {PAGE}", "origin: https://evil.example", *wants)
    assert (await edge.raw(post("/v1/models", *twice, method="OPTIONS", body=b"")))[0] == 401
    no_preflight = (f"origin: {PAGE}",)
    assert (await edge.raw(post("/v1/models", *no_preflight, method="OPTIONS", body=b"")))[0] == 401
    for odd in ("authorization\tx", "a;b", "a: b", "x" * 100, "<script>"):
        head = (f"origin: {PAGE}", wants[0], f"access-control-request-headers: {odd}")
        answer = await until_closed(edge, post("/sleep", *head, "connection: close", method="OPTIONS", body=b""))
        assert answer.startswith("HTTP/1.1 204 ")
        assert "allow-headers" not in answer
    assert (await edge.raw(post("/v1/models", f"origin: {PAGE}", *wants, method="OPTIONS", body=b"x")))[0] == 400
    assert edge.cold == []


async def test_without_the_setting_no_page_may_and_no_engine_says_otherwise() -> None:
    async with running_edge() as edge:
        edge.cold_headers = (("access-control-allow-origin", "*"), ("access-control-allow-credentials", "true"))
        key = f"x-api-key: {edge.user_key}"
        status, text = await edge.raw(post("/v1/models", key, f"origin: {PAGE}", method="GET", body=b""))
        assert status == 200
        assert "access-control-" not in text
        wants = (f"origin: {PAGE}", "access-control-request-method: GET")
        assert (await edge.raw(post("/v1/models", *wants, method="OPTIONS", body=b"")))[0] == 401


async def test_a_compressed_body_is_refused_by_name(edge: Edge, engine: FakeEngine) -> None:
    key = f"x-api-key: {edge.user_key}"
    for coding in (("gzip",), ("zstd",), ("deflate",), ("gzip, identity",), ("gzip", "identity"), ("identity", "br")):
        status, text = await edge.raw(post("/v1/chat/completions", key, *(f"content-encoding: {c}" for c in coding)))
        assert status == 415, (coding, text)
        assert "accept-encoding: identity" in text.lower()
        assert "Compressed" in message(text)
    assert (await edge.raw(post("/v1/completions", "content-encoding: gzip")))[0] == 401
    assert engine.seen() == []
    assert (await edge.raw(post("/v1/chat/completions", key, "content-encoding: Identity")))[0] == 200


async def test_http_1_0_gets_no_chunks(edge: Edge, engine: FakeEngine) -> None:
    key = f"x-api-key: {edge.user_key}"
    whole = await until_closed(edge, post("/v1/chat/completions", key, version="1.0"))
    assert " 200 " in whole.splitlines()[0]
    assert "transfer-encoding" not in whole.lower()
    assert json.loads(whole.partition("\r\n\r\n")[2])["model"] == "tiny"
    body = json.dumps(chat("tiny", "hello", stream=True)).encode()
    refused = await until_closed(edge, post("/v1/chat/completions", key, body=body, version="1.0"))
    assert " 400 " in refused.splitlines()[0]
    assert "HTTP/1.1" in message(refused)
    assert (await edge.raw(post("/v1/chat/completions", key, "connection: close", body=body)))[1].count("data: [DONE]")
    assert len(engine.seen()) == 2
    hidden = json.dumps(chat("tiny", "x" * 70_000, stream=True)).encode()  # past what the edge looks at
    late = await until_closed(edge, post("/v1/chat/completions", key, body=hidden, version="1.0"))
    assert " 400 " in late.splitlines()[0]
    assert "HTTP/1.1" in message(late)


async def test_one_that_closes_early_is_told_so_and_is_no_bad_request(edge: Edge, engine: FakeEngine) -> None:
    """HAProxy's own word for both is 400 "malformed", and accounting would count it as a mistake of that user's."""
    slow = json.dumps(chat("tiny", "@sleep=20 hello")).encode()

    async def asked() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.site.port)
        before = len(engine.seen())
        writer.write(post("/v1/chat/completions", f"x-api-key: {edge.user_key}", body=slow))

        async def at_the_engine() -> bool:
            return len(engine.seen()) > before

        await until(at_the_engine, "the engine has it")
        return reader, writer

    reader, writer = await asked()
    writer.write_eof()
    half = (await asyncio.wait_for(reader.read(), 15)).decode("latin-1")
    writer.close()
    assert half.startswith("HTTP/1.1 499 ")
    assert "sending half" in message(half)
    _, writer = await asked()
    writer.close()
    await edge.raw(b"no HTTP at all\r\n\r\n")
    bad = b"{" * 10
    assert (
        await edge.raw(post("/v1/chat/completions", f"x-api-key: {edge.user_key}", "x-gateway-model: tiny", body=bad))
    )[0] == 400

    async def logged() -> bool:
        return len(edge.usage()) == 4

    await until(logged, "four lines, each of them JSON")
    found = sorted((line["status"], line["end"]) for line in edge.usage())
    assert found == [(400, "LH"), (400, "PR"), (499, "CH"), (499, "CH")]


async def test_what_an_engine_says_too_shortly_is_said_in_openais_form(edge: Edge) -> None:
    await edge.add_engine("vectors", "--task", "embed")
    refused = await edge.ask("vectors", "hello")
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "not_found"
    assert "task" in refused.json()["error"]["message"]
    assert refused.headers["x-gateway-request"]
    latin = json.dumps(chat("vectors", "gl\xe4cier"), ensure_ascii=False).encode("latin-1")
    async with edge.client() as client:
        answer = await client.post("/v1/embeddings", content=latin)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
        assert "UTF-8" in answer.json()["error"]["message"]
        named = await client.post("/v1/embeddings", json={"input": "x"}, headers={"x-gateway-model": "vectors"})
        assert named.status_code == 200
        other = await client.post(
            "/v1/embeddings", json={"model": "n", "input": "x"}, headers={"x-gateway-model": "vectors"}
        )
        assert (other.status_code, other.json()["error"]["type"]) == (404, "fake"), "in OpenAI's form: as it is"


async def test_names_as_the_hub_has_them(edge: Edge) -> None:
    for name in ("01-ai/Yi-34B", "4bit", "model+v2", "org/4x7B+code"):
        await edge.add_engine(name, slot=0 if edge.names else None)
        assert (await edge.ask(name, "hello")).json()["model"] == name
        async with edge.client() as client:
            for written in (name, name.replace("/", "%2F").replace("+", "%2B")):
                assert (await client.get(f"/v1/models/{written}")).status_code == 200
        await edge.runtime.close(0, 0)
        edge.names.clear()
