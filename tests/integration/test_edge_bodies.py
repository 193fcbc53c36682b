"""Bodies that nobody announced: over HTTP/2, in chunks without end, with methods that have none."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator

import pytest

from gateway_plugin.edge.error_pages import DRAINED_BYTES_PER_S
from gateway_plugin.site import Limits
from tests.support.edges import Edge, FakeEngine, chat, gateway_tls, running_edge
from tests.support.http2 import flood

pytestmark = pytest.mark.integration

LIMIT = 1 << 20


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge(Limits(body_bytes=LIMIT)) as running:
        yield running


@pytest.fixture
async def engine(edge: Edge) -> FakeEngine:
    return await edge.add_engine("tiny")


async def requests_of(edge: Edge, engine: FakeEngine) -> int:
    """How many requests the edge ever gave to the engine, whole or not."""
    stat = await edge.stat(engine)
    assert stat is not None
    return stat.total


def offering(edge: Edge, *protocols: str) -> ssl.SSLContext | None:
    """A client's TLS that offers these by ALPN; none where the front door has no certificate."""
    if edge.site.certificate is None:
        return None
    context = gateway_tls(edge.layout)
    context.check_hostname = False
    if protocols:
        context.set_alpn_protocols(protocols)
    return context


@pytest.mark.parametrize(
    ("tls", "offered"), [(False, ()), (True, ()), (True, ("h2",)), (True, ("h2", "http/1.1"))], ids=str
)
async def test_http2_reaches_nobody(tls: bool, offered: tuple[str, ...]) -> None:
    """By its preface, asked for or not: without ``:authority`` HAProxy would pass a request on in origin form."""
    async with running_edge(Limits(body_bytes=LIMIT), tls=tls) as edge:
        engine = await edge.add_engine("tiny")
        beginning = json.dumps(chat("tiny", "hello")).encode()[:-1]
        common = [(":scheme", "http"), ("host", "edge"), ("x-api-key", edge.user_key)]
        for method, path, named in (
            ("POST", "/v1/chat/completions", [("x-gateway-model", "tiny")]),
            ("POST", "/v1/chat/completions", []),
            ("GET", "/v1/models", []),
            ("POST", "/gateway/v1/models/load", []),
        ):
            headers = [(":method", method), (":path", path), *common, *named]
            try:
                sent, heard = await flood(edge.site.port, headers, beginning, offering(edge, *offered))
            except ssl.SSLError:
                continue  # not even a handshake
            assert sent < 8 * LIMIT, "no more than sockets hold"
            assert b"cold" not in heard
            assert not heard or heard.startswith(b"HTTP/1.1 4"), heard[:100]
        assert engine.seen() == []
        assert edge.cold == []
        assert await requests_of(edge, engine) == 0
        assert (await edge.ask("tiny", "hello")).json()["model"] == "tiny"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("piece", [1, 7, 60_000])
async def test_a_chunked_body_without_end_reaches_no_engine(
    edge: Edge, engine: FakeEngine, version: str, named: bool, piece: int
) -> None:
    """Its length is known with its end only: past the buffer it is the ingress's, which holds it to the limit."""
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.site.port)
    head = f"POST /v1/chat/completions HTTP/{version}\r\nhost: e\r\nx-api-key: {edge.user_key}\r\n"
    head += "transfer-encoding: chunked\r\n" + ("x-gateway-model: tiny\r\n" if named else "")
    writer.write(head.encode() + b"\r\n")
    beginning = json.dumps(chat("tiny", "hello")).encode()[:-2]
    chunk = b"%x\r\n%b\r\n"
    writer.write(chunk % (len(beginning), beginning))
    many = chunk % (piece, b"x" * piece) * max(1, 65536 // piece)
    sent = 0
    try:
        async with asyncio.timeout(5):
            while sent < 2 * LIMIT:
                writer.write(many)
                await writer.drain()
                sent += len(many)
            writer.write(b"0\r\n\r\n")
            await reader.read(100)
    except (TimeoutError, OSError):
        pass  # closed on us, or left waiting: what counts is what arrived
    finally:
        writer.close()
    assert await requests_of(edge, engine) == 0
    assert engine.seen() == []


async def test_nothing_but_a_post_has_a_body(edge: Edge, engine: FakeEngine) -> None:
    key = f"x-api-key: {edge.admin_key}"
    for method in ("GET", "HEAD", "DELETE", "OPTIONS", "PUT", "PATCH", "TRACE", "get", "CONNECT"):
        for path in ("/v1/chat/completions", "/v1/models", "/v1/models/tiny", "/health", "/gateway/v1/status"):
            for framing, body in (
                ("content-length: 5", b"hello"),
                ("transfer-encoding: chunked", b"5\r\nhello\r\n0\r\n\r\n"),
            ):
                lines = [f"{method} {path} HTTP/1.1", "host: e", "connection: close", key, framing]
                status, text = await edge.raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
                assert status == 400, (method, path, text)
    for framing in ("content-length: 5", "transfer-encoding: chunked"):  # announced, and by HTTP/1.0 or 0.9
        for version in ("HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.2", "HTTP/3"):
            lines = [f"GET /v1/models {version}", "host: e", "connection: close", key, framing]
            status, text = await edge.raw("\r\n".join(lines).encode() + b"\r\n\r\nhello")
            assert 400 <= status < 600, (version, text)
    assert await requests_of(edge, engine) == 0
    assert edge.cold == []


@pytest.mark.parametrize("length", [2**31, 3 * 10**9, 2**32, 2**32 + 5, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**25])
async def test_a_length_past_any_number_is_no_small_one(edge: Edge, engine: FakeEngine, length: int) -> None:
    body = json.dumps(chat("tiny", "hello")).encode()
    for method, path, expected in (("POST", "/v1/chat/completions", (413, 400)), ("GET", "/v1/models", (400,))):
        for model in ("", "x-gateway-model: tiny\r\n"):
            head = (
                f"{method} {path} HTTP/1.1\r\nhost: e\r\nx-api-key: {edge.user_key}\r\n{model}content-length: {length}"
            )
            status, text = await edge.raw(head.encode() + b"\r\n\r\n" + body)
            assert status in expected, (method, length, text)
    assert await requests_of(edge, engine) == 0
    assert edge.cold == []
    assert all(entry["first_byte_ms"] >= -1 for entry in edge.usage()), "each line is JSON, of what is no HTTP too"


async def test_refused_bodies_are_read_slowly_all_together(edge: Edge) -> None:
    """Callers without a key that send as fast as they can: beyond so much a second they are kept waiting."""
    sent = [0]

    async def send() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", edge.site.port)
        writer.transport.set_write_buffer_limits(high=65536)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: e\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            while True:
                writer.write(b"8000\r\n" + b"x" * 32768 + b"\r\n")
                await writer.drain()
                sent[0] += 32768
        finally:
            writer.close()

    senders = [asyncio.create_task(send()) for _ in range(20)]
    try:
        await asyncio.sleep(2)  # what sockets hold has gone
        before, begin = sent[0], time.monotonic()
        await asyncio.sleep(4)
        rate = (sent[0] - before) / (time.monotonic() - begin)
    finally:
        for sender in senders:
            sender.cancel()
        await asyncio.wait(senders)
    assert not any(sender.exception() for sender in senders if not sender.cancelled())
    assert rate < 3 * DRAINED_BYTES_PER_S
    assert sent[0] > DRAINED_BYTES_PER_S, "but they are read"
    assert edge.cold == []
