"""Routes at run time: opened, drained, closed, lost and found again; what dies costs what it must and no more."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator

import httpx
import pytest

from gateway_plugin.errors import EdgeError
from tests.support.edges import Edge, chat, running_edge, until

pytestmark = pytest.mark.integration


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge() as running:
        yield running


def inner(edge: Edge) -> httpx.AsyncClient:
    """What the ingress uses."""
    transport = httpx.AsyncHTTPTransport(uds=str(edge.layout.inner_door))
    return httpx.AsyncClient(transport=transport, base_url="http://inner", timeout=30)


async def stream(edge: Edge, text: str) -> tuple[str, bool]:
    """All that came of a stream, and whether it ended as it should."""
    got = ""
    try:
        async with (
            edge.client() as client,
            client.stream("POST", "/v1/chat/completions", json=chat("tiny", text, stream=True)) as answer,
        ):
            async for piece in answer.aiter_text():
                got += piece
    except httpx.RemoteProtocolError:
        return got, False
    return got, True


async def test_a_route_is_opened_and_closed(edge: Edge) -> None:
    engine = await edge.add_engine("tiny")
    (stat,) = await edge.runtime.servers()
    assert (stat.slot, stat.server, stat.address, stat.up, stat.draining) == (0, 0, engine.address, True, False)
    assert stat.idle_s == -1
    for _ in range(3):
        assert (await edge.ask("tiny", "hello")).json()["model"] == "tiny"

    async def three_ended() -> bool:
        (stat,) = await edge.runtime.servers((0,))
        return (stat.total, stat.in_flight) == (3, 0)

    await until(three_ended, "three requests have ended")
    (stat,) = await edge.runtime.servers((0,))
    assert 0 <= stat.idle_s <= 30
    await edge.runtime.close(0, 0)
    assert await edge.runtime.servers() == ()
    assert (await edge.ask("tiny", "hello")).json()["cold"] is True
    assert edge.cold[-1].header("x-gateway-model") == "tiny"


async def test_it_takes_requests_the_moment_it_is_open(edge: Edge) -> None:
    """Also where the server was DOWN before: it would refuse for half a second more."""
    engine = await edge.add_engine("tiny")
    for _ in range(5):
        engine.kill()
        assert (await edge.ask("tiny", "hello")).json()["cold"] is True
        engine = await edge.start_engine("tiny")
        await edge.runtime.open(0, 0, engine.address)
        assert (await edge.ask("tiny", "hello")).json().get("model") == "tiny"


async def test_bytes_of_a_stream_are_counted_while_it_runs(edge: Edge) -> None:
    """By them it is known that an engine moves: every 5 s, that is, and not only when the stream has ended."""
    await edge.add_engine("tiny", "--token-rate", "4", "--tokens", "600")
    running = asyncio.create_task(stream(edge, "hello"))
    counts: set[int] = set()

    async def counted() -> bool:
        (stat,) = await edge.runtime.servers()
        counts.add(stat.bytes_out)
        return len(counts) > 2

    await until(counted, "two counts of a stream", 14)
    assert not running.done()
    running.cancel()


async def test_drain_while_a_stream_runs(edge: Edge) -> None:
    engine = await edge.add_engine("tiny", "--token-rate", "20")
    running = asyncio.create_task(stream(edge, "@tokens=20"))

    async def in_flight(count: int) -> bool:
        stat = await edge.stat(engine)
        return stat is not None and stat.in_flight == count

    await until(lambda: in_flight(1), "the stream runs")
    await edge.runtime.drain(0, 0)
    stat = await edge.stat(engine)
    assert stat is not None
    assert (stat.draining, stat.up, stat.in_flight) == (True, True, 1)
    for _ in range(5):
        assert (await edge.ask("tiny", "hello")).json()["cold"] is True
    assert not running.done()
    text, whole = await running
    assert whole
    assert text.count("data: ") == 21
    await until(lambda: in_flight(0), "nothing is in flight any more")
    assert len(engine.seen()) == 1
    await edge.runtime.close(0, 0)


async def test_a_drain_taken_back_cuts_nothing(edge: Edge) -> None:
    engine = await edge.add_engine("tiny", "--token-rate", "20")
    running = asyncio.create_task(stream(edge, "@tokens=15"))

    async def it_runs() -> bool:
        stat = await edge.stat(engine)
        return stat is not None and stat.in_flight == 1

    await until(it_runs, "the stream runs")
    await edge.runtime.drain(0, 0)
    await edge.runtime.open(0, 0, engine.address)
    assert (await edge.ask("tiny", "@tokens=1")).json()["model"] == "tiny"
    text, whole = await running
    assert whole
    assert text.count("data: ") == 16


async def test_an_engine_killed_before_its_first_byte(edge: Edge) -> None:
    """Every request it had lands on the cold path by itself."""
    engine = await edge.add_engine("tiny")
    asked = [asyncio.create_task(edge.ask("tiny", f"@hang number {number}")) for number in range(24)]

    async def all_there() -> bool:
        stat = await edge.stat(engine)
        return stat is not None and stat.in_flight == 24

    await until(all_there, "24 in flight")
    engine.kill()
    answers = await asyncio.gather(*asked)
    assert [answer.status_code for answer in answers] == [200] * 24
    assert all(answer.json()["cold"] for answer in answers)
    assert len(edge.cold) == 24
    for request in edge.cold:
        assert request.header("x-gateway-model") == "tiny"
        assert request.header("authorization") == ""
        assert request.header("x-gateway-stamp") == ""


async def test_an_engine_killed_in_a_stream(edge: Edge) -> None:
    await edge.add_engine("tiny", "--token-rate", "50")
    text, whole = await stream(edge, "@crash-mid-stream @tokens=10")
    assert not whole, "a broken transfer, never a silent end"
    assert text.count("data: ") == 5
    assert "[DONE]" not in text
    assert (await edge.ask("tiny", "hello")).json()["cold"] is True


async def test_of_two_engines_the_other_takes_over(edge: Edge) -> None:
    first = await edge.add_engine("tiny", server=0)
    second = await edge.add_engine("tiny", server=1)
    answers = await asyncio.gather(*(edge.ask("tiny", "@sleep=1.5") for _ in range(8)))
    assert all(answer.json()["model"] == "tiny" for answer in answers)
    assert {len(first.seen()), len(second.seen())} == {4}
    first.kill()
    for _ in range(5):
        assert f"pid={second.child.pid}" in (await edge.ask("tiny", "hello")).text
    await edge.runtime.drain(0, 1)
    assert (await edge.ask("tiny", "hello")).json()["cold"] is True


async def test_a_busy_engine_is_not_condemned(edge: Edge) -> None:
    """It answers nothing for a while, not even checks and handshakes; it gets what came meanwhile."""
    engine = await edge.add_engine("tiny")
    assert (await edge.ask("tiny", "hello")).status_code == 200
    os.kill(engine.child.pid, signal.SIGSTOP)
    try:
        asked = [asyncio.create_task(edge.ask("tiny", "hello")) for _ in range(4)]
        await asyncio.sleep(7)
        assert await edge.is_up(engine)
    finally:
        os.kill(engine.child.pid, signal.SIGCONT)
    assert all(answer.json().get("model") == "tiny" for answer in await asyncio.gather(*asked))
    assert edge.cold == []


async def test_the_inner_door(edge: Edge) -> None:
    engine = await edge.add_engine("tiny")
    headers = {"x-gateway-model": "tiny", "x-gateway-request": "r-1", "x-gateway-key": "ann"}
    async with inner(edge) as ingress:
        answer = await ingress.post("/v1/chat/completions", json=chat("tiny", "x" * 500_000), headers=headers)
        assert answer.json()["model"] == "tiny"
        seen = dict(engine.seen()[0]["headers"])
        assert (seen["x-gateway-request"], seen["x-gateway-stamp"]) == ("r-1", "1")
        assert seen["authorization"] == f"Bearer {edge.runtime.slot_key(0)}"
        await edge.runtime.close(0, 0)
        for model in ("tiny", "unknown"):  # no usable server, no slot
            spoofed = {**headers, "x-gateway-model": model, "authorization": "Bearer x", "x-gateway-edge": "guess"}
            await ingress.post("/v1/chat/completions", json=chat(model, "hello"), headers=spoofed)
            back = edge.cold[-1]
            assert (back.header("x-gateway-stamp"), back.header("x-gateway-model")) == ("1", model)
            assert back.header("x-gateway-edge") == edge.layout.edge_secret.read_text()
            assert back.header("authorization") == ""
        assert len(edge.cold) == 2
        for bad in ({}, {"x-gateway-model": "a;b"}, {"x-gateway-model": ""}):
            refused = await ingress.post("/v1/chat/completions", json=chat("tiny", "x"), headers=bad)
            assert refused.status_code == 400, bad
        assert (await ingress.post("/sleep", headers=headers)).status_code == 404
        assert (await ingress.get("/v1/models", headers=headers)).status_code == 404
    assert edge.usage() == [], "the front door's line counts the request, not this one"


async def test_names_and_aliases_change_at_run_time(edge: Edge) -> None:
    runtime = edge.runtime
    await runtime.sync_slots({"a": 0, "a-alias": 0, "b": 1}, (0, 1))
    first, second = runtime.slot_key(0), runtime.slot_key(1)
    assert first != second
    assert await runtime.tenants() == {"a": 0, "a-alias": 0, "b": 1}
    await runtime.sync_slots({"a": 0, "c": 1}, (1,))
    assert await runtime.tenants() == {"a": 0, "c": 1}
    assert runtime.slot_key(0) == first
    assert runtime.slot_key(1) != second
    await runtime.sync_slots({"a": 2, "c": 1}, (2,))
    assert await runtime.tenants() == {"a": 2, "c": 1}
    assert edge.socket(f"show map {edge.layout.slot_keys_map}").count("slot") == 3
    with pytest.raises(EdgeError):
        runtime.slot_key(3)
    for path in (edge.layout.models_map, edge.layout.slot_keys_map, edge.layout.servers_state, edge.layout.edge_config):
        assert path.stat().st_mode & 0o777 == 0o600, path


async def test_an_edge_killed_comes_back_with_the_same_routes(edge: Edge) -> None:
    ready = await edge.add_engine("tiny", "--host", "127.0.0.2")  # any address but the one in the configuration
    drained = await edge.add_engine("other")
    closed = await edge.add_engine("third")
    await edge.runtime.drain(drained.slot, 0)
    await edge.runtime.close(closed.slot, 0)
    key = edge.runtime.slot_key(0)
    edge.kill()
    with pytest.raises(EdgeError, match="does not answer"):
        await edge.runtime.servers()
    await edge.start()
    assert edge.runtime.slot_key(0) == key
    assert await edge.runtime.tenants() == {"tiny": 0, "other": 1, "third": 2}
    assert (await edge.ask("tiny", "hello")).json()["model"] == "tiny"
    assert {(s.slot, s.address, s.up, s.draining) for s in await edge.runtime.servers()} == {
        (0, ready.address, True, False),
        (1, drained.address, True, True),
    }
    assert (await edge.ask("other", "hello")).json()["cold"] is True
    # A key revoked while the edge was away, and one made: the map file is what counts.
    assert (await edge.ask("third", "hello")).json()["cold"] is True
    await edge.runtime.open(drained.slot, 0, drained.address)
    assert (await edge.ask("other", "hello")).json()["model"] == "other"


async def test_a_body_past_the_buffer_reaches_a_restarted_engine(edge: Edge) -> None:
    """It is not kept for a second try; a refused connection costs nothing all the same."""
    engine = await edge.add_engine("tiny")
    engine.kill()
    async with edge.client() as client:
        body = json.dumps(chat("tiny", "x" * 300_000))
        answer = await client.post("/v1/chat/completions", content=body)
    assert answer.json() == {"cold": True, "bytes": len(body), "path": "/v1/chat/completions"}
    assert edge.cold[-1].body == body.encode()


async def test_a_client_that_leaves_frees_its_place(edge: Edge) -> None:
    engine = await edge.add_engine("tiny")
    asked = asyncio.create_task(edge.ask("tiny", "@hang"))

    async def in_flight(count: int) -> bool:
        stat = await edge.stat(engine)
        return stat is not None and stat.in_flight == count

    await until(lambda: in_flight(1), "it is there")
    asked.cancel()
    await until(lambda: in_flight(0), "it is gone")


async def test_under_load_nothing_is_lost_by_drains(edge: Edge) -> None:
    """Two engines drained and opened in turn under eight clients: every request answered."""
    engines = [await edge.add_engine("tiny", server=server) for server in range(2)]
    stop = asyncio.Event()
    statuses: list[int] = []

    async def caller() -> None:
        async with edge.client() as client:
            while not stop.is_set():
                answer = await client.post("/v1/chat/completions", json=chat("tiny", "hello"))
                statuses.append(answer.status_code)

    callers = [asyncio.create_task(caller()) for _ in range(8)]
    for turn in range(12):
        engine = engines[turn % 2]
        await edge.runtime.drain(0, engine.server)

        async def empty(wanted: int = engine.server) -> bool:
            return all(stat.in_flight == 0 for stat in await edge.runtime.servers((0,)) if stat.server == wanted)

        await until(empty, "drained")
        before = len(engine.seen())
        await asyncio.sleep(0.02)
        assert len(engine.seen()) == before, "nothing arrives after a drain"
        await edge.runtime.close(0, engine.server)
        await edge.runtime.open(0, engine.server, engine.address)

        async def ten_a_turn(wanted: int = 10 * (turn + 1)) -> bool:
            return len(statuses) > wanted

        await until(ten_a_turn, "callers go on")
    stop.set()
    await asyncio.gather(*callers)
    assert set(statuses) == {200}
