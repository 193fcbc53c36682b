"""The relay costs the same however many answers pass, and what comes before a break is passed on."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

import httpx
import pytest

from serve.ingress.body import Ask
from serve.ingress.relay import Relay
from tests.support.inner_doors import inner_door

_HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    writer.write(_HEAD)
    if b"x-hold" in head:
        await reader.read()  # until the relay gives it up
    else:
        writer.write(b"0\r\n\r\n")
    writer.close()


async def _cost_s(relay: Relay, requests: int = 40) -> float:
    """CPU seconds of this process for so many requests, the better of three."""
    found = []
    for _ in range(3):
        began = time.process_time()
        for _ in range(requests):
            response = await relay.send("POST", "/x", {}, Ask(b"", "m", True))
            assert await response.aread() == b"hello"
            await response.aclose()
        found.append(time.process_time() - began)
    return min(found)


async def test_a_request_costs_the_same_beside_a_thousand_others() -> None:
    """With a pool that looks through its connections: ten times as much."""
    with tempfile.TemporaryDirectory(prefix="gwr-", dir="/tmp") as folder:
        path = Path(folder) / "s"
        server = await asyncio.start_unix_server(_answer, path=str(path), backlog=2048)
        relay, held = Relay(path), []
        alone = await _cost_s(relay)
        for _ in range(1000):
            held.append(await relay.send("POST", "/x", {"x-hold": "1"}, Ask(b"", "m", True)))
        beside = await _cost_s(relay)
        for response in held:
            await response.aclose()
        await relay.close()
        server.close()
    assert beside < 3 * alone


async def test_what_came_before_a_break_is_passed_on_and_then_the_break() -> None:
    broken = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf"
    async with inner_door(broken) as door:
        relay, got = Relay(door.path), b""
        response = await relay.send("POST", "/x", {}, Ask(b"", "m", False))
        await asyncio.sleep(0.05)  # the break is there before anybody reads
        with pytest.raises(httpx.RemoteProtocolError):
            async for piece in response.aiter_raw():
                got += piece
        await relay.close()
    assert got == b"half"


async def test_an_edge_that_is_away_is_a_transport_error(tmp_path: Path) -> None:
    relay = Relay(tmp_path / "nobody.sock")
    with pytest.raises(httpx.TransportError):
        await relay.send("POST", "/x", {}, Ask(b"", "m", False))
    await relay.close()
