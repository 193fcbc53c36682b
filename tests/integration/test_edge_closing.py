"""A drain at a running edge: who is refused, who may end, who is cut, and who may still look on."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from gateway_plugin.service import draining as draining_module
from gateway_plugin.service.draining import Drain, drain, drain_as_asked, forget_requests, read_drain
from tests.support.edges import Edge, chat, running_edge, until

pytestmark = pytest.mark.integration


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge() as running:
        yield running


async def stream(edge: Edge, text: str) -> str:
    """How a stream ended: ``whole``, or the client's error."""
    body = chat("tiny", text, stream=True)
    try:
        async with edge.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
            return "whole" if b"[DONE]" in await answer.aread() else "silently short"
    except httpx.TransportError as error:
        return type(error).__name__


async def begun(edge: Edge, text: str) -> asyncio.Task[str]:
    task = asyncio.create_task(stream(edge, text))

    async def under_way() -> bool:
        return sum(stat.in_flight for stat in await edge.runtime.servers()) == 1

    await until(under_way, "it streams")
    return task


def draining(
    edge: Edge, grace_s: float, hurry: threading.Event, told: list[Drain] | None = None
) -> asyncio.Task[Drain]:
    tell = (lambda _: None) if told is None else told.append
    return asyncio.create_task(asyncio.to_thread(drain, edge.layout, grace_s, hurry, tell))


async def test_while_a_stream_ends_new_requests_are_refused_and_administrators_look_on(edge: Edge) -> None:
    await edge.add_engine("tiny", "--token-rate", "10")
    running = await begun(edge, "@tokens=20")
    told: list[Drain] = []
    ending = draining(edge, 20.0, threading.Event(), told)

    async def shut() -> bool:
        async with edge.client("") as nobody:
            return (await nobody.get("/health")).status_code == 503

    await until(shut, "the door is shut")
    for refused in (await edge.ask("tiny", "hello"), await edge.ask("cold", "hello")):
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "going_down"
        assert "going down" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) > 0
    async with edge.client("") as nobody:
        assert {(await nobody.get(path)).status_code for path in ("/health", "/ready")} == {503}
    async with edge.client(edge.admin_key) as admin:
        assert (await admin.get("/gateway/v1/status")).status_code == 200
        assert (await admin.get("/v1/models")).status_code == 503
    assert await running == "whole"
    found = await asyncio.wait_for(ending, 60.0)
    assert (found.first, found.cut, found.done) == (1, 0, True)
    assert found.seconds < 20.0, "of the twenty given"
    assert told[0].in_flight == 1
    assert 10.0 < told[0].left_s <= 20.0
    assert "/gateway/v1/close" in {request.path for request in edge.cold}, "who waits for a model is told"

    await asyncio.to_thread(forget_requests, edge.layout)
    assert (await edge.ask("tiny", "hello")).status_code == 200


@pytest.mark.parametrize("end", ["the grace is over", "the user will not wait"])
async def test_what_is_left_is_cut_visibly_at_that_time(edge: Edge, end: str) -> None:
    await edge.add_engine("tiny", "--token-rate", "10")
    running = await begun(edge, "@tokens=600")
    hurry, began = threading.Event(), time.monotonic()
    ending = draining(edge, 1.5 if end == "the grace is over" else 60.0, hurry)
    await asyncio.sleep(0.7)
    assert not running.done()
    if end != "the grace is over":
        hurry.set()
    assert await running in ("RemoteProtocolError", "ReadError")
    took_s = time.monotonic() - began
    assert (0.7 if hurry.is_set() else 1.4) < took_s < 20.0
    found = await ending
    assert (found.first, found.cut) == (1, 1)


async def test_a_supervisor_that_is_only_signalled_gives_a_bounded_time(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a machine shuts down: nobody said how long, and everything is killed soon."""
    monkeypatch.setattr(draining_module, "SIGNALLED_GRACE_S", 1.0)
    await edge.add_engine("tiny", "--token-rate", "10")
    running = await begun(edge, "@tokens=600")
    began = time.monotonic()
    found = await asyncio.to_thread(drain_as_asked, edge.layout, threading.Event())
    assert 0.9 < time.monotonic() - began < 20.0, "the stream takes a minute"
    assert await running in ("RemoteProtocolError", "ReadError")
    assert (found.first, found.cut) == (1, 1)
    assert read_drain(edge.layout) == found, "'gateway down' would have seen how far it is"


async def test_nothing_in_flight_is_not_waited_for_and_no_grace_shuts_nothing(edge: Edge) -> None:
    await edge.add_engine("tiny")
    assert (await draining(edge, 0.0, threading.Event())).done
    assert (await edge.ask("tiny", "hello")).status_code == 200
    found = await draining(edge, 60.0, threading.Event())
    assert found.seconds < 20.0, "of the sixty given"
    assert (await edge.ask("tiny", "hello")).status_code == 503


async def test_the_refusal_reaches_a_caller_that_has_sent_a_large_body(edge: Edge) -> None:
    await draining(edge, 60.0, threading.Event())
    refused = await edge.ask("tiny", "x" * 2_000_000)
    assert json.loads(refused.content)["error"]["code"] == "going_down"
