"""An agent's questions, to engines that mean it no good."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from gateway_plugin.paths import Layout
from serve.agent.probe import Probe, ProbeFailed, client_context
from tests.support.agents import KEY, private_layout
from tests.support.raw_http import tls_context

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


@pytest.fixture
def layout() -> Iterator[Layout]:
    with private_layout() as made:
        yield made


@asynccontextmanager
async def engine(
    layout: Layout, head: bytes, pieces: Callable[[], Iterator[bytes]], pause_s: float
) -> AsyncIterator[Probe]:
    """A probe of an engine that answers every request with ``head`` and ``pieces``."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(head + b"\r\n")
                for piece in pieces():
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(pause_s)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    context = tls_context(str(layout.engine_key), str(layout.engine_certificate), str(layout.ca), 2)
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    host, port = server.sockets[0].getsockname()
    probe = Probe(f"{host}:{port}", client_context(layout), KEY)
    try:
        yield probe
    finally:
        await probe.close()
        server.close()


def whole(content: bytes) -> tuple[bytes, Callable[[], Iterator[bytes]]]:
    return HEAD + b"content-length: %d\r\n" % len(content), lambda: iter((content,))


def endless(piece: bytes) -> Callable[[], Iterator[bytes]]:
    return lambda: iter(lambda: piece, b"")


async def test_an_answer_is_an_answer(layout: Layout) -> None:
    async with engine(layout, *whole(json.dumps({"choices": [{"text": "Hi"}]}).encode()), 0.0) as probe:
        await probe.ask("m", "generate", 30.0)
        assert (await probe.health(30.0)).ok


@pytest.mark.parametrize("encoding", [b"", b"content-encoding: gzip\r\n"])
async def test_an_endless_answer_is_given_up_and_not_kept(layout: Layout, encoding: bytes) -> None:
    tracemalloc.start()
    try:
        async with engine(layout, HEAD + encoding, endless(b"x" * 65536), 0.0) as probe:
            with pytest.raises(ProbeFailed, match="larger than 1048576 bytes"):
                await probe.ask("m", "generate", 20.0)
            health = await probe.health(20.0)
            assert (health.ok, "larger than" in health.why) == (False, True)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


async def test_one_that_trickles_is_given_up_at_the_deadline(layout: Layout) -> None:
    """Each piece comes in time, the answer never does."""
    async with engine(layout, HEAD, endless(b"x"), 0.05) as probe:
        begun = time.monotonic()
        with pytest.raises(ProbeFailed, match=r"no whole answer within 0\.4 s"):
            await probe.ask("m", "generate", 0.4)
        assert not (await probe.health(0.4)).ok
        assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("content", "length"),
    [
        (b'{"data": [{"id": "m", "max_model_len": 4096}]}', 4096),
        (b'{"data": [{"id": "m"}]}', None),
        (b'{"data": [{"max_model_len": "4096"}]}', None),
        (b'{"data": [{"max_model_len": true}]}', None),
        (b'{"data": [{"max_model_len": -1}]}', None),
        (b'{"data": []}', None),
        (b"[1]", None),
        (b"[" * 200_000, None),
        (b"no JSON", None),
    ],
)
async def test_the_length_is_what_the_engine_says_where_it_says_one(
    layout: Layout, content: bytes, length: int | None
) -> None:
    async with engine(layout, *whole(content), 0.0) as probe:
        assert await probe.max_model_len() == length
    async with engine(layout, HEAD, endless(b"x"), 0.05) as probe:
        assert await probe.max_model_len(0.2) is None


@pytest.mark.parametrize("content", [b"[" * 200_000, b"{}", b"[]", b"\xff\xfe", b'"choices"'])
async def test_nonsense_is_no_answer(layout: Layout, content: bytes) -> None:
    async with engine(layout, *whole(content), 0.0) as probe:
        with pytest.raises(ProbeFailed, match="was answered 200"):
            await probe.ask("m", "generate", 30.0)
