"""An engine that has as many requests as it takes: the rest wait at the edge, in fair turns, and none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from gateway_plugin.edge.keys import KeyStore
from gateway_plugin.site import Limits
from tests.support.edges import Edge, FakeEngine, chat, running_edge, until

pytestmark = pytest.mark.integration


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge(Limits(queued_requests=10, queue_s=60)) as running:
        yield running


async def limited(edge: Edge, limit: int, server: int = 0) -> FakeEngine:
    """An engine that takes ``limit`` requests at a time."""
    engine = await edge.start_engine("tiny", server=server)
    await edge.runtime.open(engine.slot, server, engine.address, limit)
    await until(lambda: edge.is_up(engine), "the edge reports the engine up")
    return engine


async def count(edge: Edge, engine: FakeEngine, in_flight: int, queued: int) -> None:
    async def there() -> bool:
        stat = await edge.stat(engine)
        return stat is not None and (stat.in_flight, stat.queued) == (in_flight, queued)

    await until(there, f"{in_flight} in flight, {queued} waiting")


def asks(edge: Edge, many: int, text: str) -> list[asyncio.Task[httpx.Response]]:
    return [asyncio.create_task(edge.ask("tiny", text)) for _ in range(many)]


async def post(edge: Edge, key: str, text: str, **headers: str) -> httpx.Response:
    async with edge.client(key) as client:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await client.post("/v1/chat/completions", json=chat("tiny", text), headers=named)


async def test_what_is_over_the_limit_waits_at_the_edge(edge: Edge) -> None:
    engine = await limited(edge, 2)
    asked = asks(edge, 5, "@sleep=1.5")
    await count(edge, engine, in_flight=2, queued=3)
    assert [answer.json()["model"] for answer in await asyncio.gather(*asked)] == ["tiny"] * 5
    asked = asks(edge, 5, "@hang")
    await count(edge, engine, in_flight=2, queued=3)
    await edge.runtime.limit(0, 0, 4)
    await count(edge, engine, in_flight=4, queued=1)
    await edge.runtime.limit(0, 0, 0)
    await count(edge, engine, in_flight=5, queued=0)
    for task in asked:
        task.cancel()


async def test_who_waited_in_vain_is_told_how_many_wait() -> None:
    async with running_edge(Limits(queue_s=2)) as edge:
        await limited(edge, 1)
        asked = asks(edge, 2, "@hang")
        done, _ = await asyncio.wait(asked, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == 1
        refused = done.pop().result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_busy")
        assert refused.json()["error"]["state"] == "busy"
        assert refused.headers["x-gateway-position"] == "0"
        assert refused.headers["retry-after"] == "10"
        assert refused.headers["x-gateway-request"]
        for task in asked:
            task.cancel()


async def test_a_queue_is_full_for_those_who_filled_it(edge: Edge) -> None:
    engine = await limited(edge, 1)
    other = KeyStore(edge.layout).create("bob", "user")
    asked = asks(edge, 11, "@hang")
    await count(edge, engine, in_flight=1, queued=10)
    for body in ("hello", "x" * 50_000):
        refused = await edge.ask("tiny", body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_busy")
        assert refused.headers["x-gateway-position"] == "10"
    waits = asyncio.create_task(post(edge, other, "@hang"))
    await count(edge, engine, in_flight=1, queued=11)
    for task in (*asked, waits):
        task.cancel()


@pytest.mark.parametrize("end", ["drained", "closed", "killed"])
async def test_what_waits_for_an_engine_that_goes_takes_the_cold_path(edge: Edge, end: str) -> None:
    engine = await limited(edge, 2)
    asked = asks(edge, 8, "@hang" if end == "killed" else "@sleep=2")
    await count(edge, engine, in_flight=2, queued=6)
    if end == "killed":
        edge.cold_hangs = True  # else what it had and the ingress answered would make HAProxy look into the queue
        engine.kill()

        async def it_is_down() -> bool:
            return not await edge.is_up(engine)

        await until(it_is_down, "the edge knows")
        await edge.runtime.release(0)
    elif end == "drained":
        await edge.runtime.drain(0, 0)
        stat = await edge.stat(engine)
        assert stat is not None
        assert (stat.in_flight, stat.queued, stat.draining) == (2, 0, True)
    else:
        await edge.runtime.close(0, 0)
    cold = 8 if end == "killed" else 6

    async def came() -> bool:
        return len(edge.cold) == cold

    await until(came, "the ingress has them")
    if end == "killed":
        for task in asked:
            task.cancel()
        return
    answers = await asyncio.gather(*asked)
    assert [answer.status_code for answer in answers] == [200] * 8
    assert sum(answer.json().get("cold", False) for answer in answers) == cold
    assert all(request.header("authorization") == "" for request in edge.cold)


async def test_what_waits_for_one_of_two_engines_goes_to_the_other(edge: Edge) -> None:
    engines = [await limited(edge, 1, server) for server in range(2)]
    asked = asks(edge, 4, "@sleep=2")
    for engine in engines:
        await count(edge, engine, in_flight=1, queued=1)
    await edge.runtime.drain(0, 0)
    await count(edge, engines[1], in_flight=1, queued=2)
    answers = await asyncio.gather(*asked)
    assert [answer.json().get("model") for answer in answers] == ["tiny"] * 4
    assert len(engines[0].seen()) == 1
    assert edge.cold == []


async def test_who_has_less_goes_first_and_batch_goes_last() -> None:
    async with running_edge(Limits(queue_s=60)) as edge:
        await less_goes_first(edge)


async def less_goes_first(edge: Edge) -> None:
    engine = await limited(edge, 1)
    store = KeyStore(edge.layout)
    keys = {name: store.create(name, "user") for name in ("bob", "eve")}
    night = store.create("night", "user", "batch")
    order: list[str] = []

    async def one(who: str, key: str, **headers: str) -> None:
        assert (await post(edge, key, "@sleep=0.05", **headers)).status_code == 200
        order.append(who)

    held = asks(edge, 1, "@sleep=4")
    await count(edge, engine, in_flight=1, queued=0)
    first = [asyncio.create_task(one("ann", edge.user_key)) for _ in range(3)]
    await count(edge, engine, in_flight=1, queued=3)
    later = [
        asyncio.create_task(one("night", night, x_gateway_priority="interactive")),
        asyncio.create_task(one("eve, batch", keys["eve"], x_gateway_priority="batch")),
        asyncio.create_task(one("bob", keys["bob"])),
    ]
    await count(edge, engine, in_flight=1, queued=6)
    await asyncio.gather(*held, *first, *later)
    assert order[:4] == ["bob", "ann", "ann", "ann"]
    assert {*order[4:]} == {"night", "eve, batch"}
    turn = edge.socket("get var proc.turn0")
    assert turn.startswith("proc.turn0: type=sint value=<"), "measured"


async def test_the_cold_path_hears_the_class_and_none_that_a_caller_made_up(edge: Edge) -> None:
    night = KeyStore(edge.layout).create("night", "user", "batch")
    await edge.runtime.sync_slots({"tiny": 0}, (0,))
    for key, said, heard in (
        (edge.user_key, {}, ""),
        (edge.user_key, {"x_gateway_priority": "interactive"}, ""),
        (edge.user_key, {"x_gateway_priority": "batch"}, "batch"),
        (night, {}, "batch"),
        (night, {"x_gateway_priority": "interactive"}, "batch"),
    ):
        assert (await post(edge, key, "hello", **said)).json()["cold"] is True
        assert edge.cold[-1].header("x-gateway-priority") == heard, (said, heard)
    refused = await post(edge, night, "hello", x_gateway_priority="urgent")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")
    assert len(edge.cold) == 5
