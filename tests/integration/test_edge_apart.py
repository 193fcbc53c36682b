"""A model that is kept apart: its requests pass the ingress, or go round it while it is away, and never in circles."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.support.edges import Edge, FakeEngine, chat, running_edge, until

pytestmark = pytest.mark.integration


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge() as running:
        yield running


async def kept_apart(edge: Edge) -> FakeEngine:
    """A model that is kept apart though an engine serves it, and an ingress that is up for all that is known."""
    engine = await edge.add_engine("tiny")
    await edge.runtime.sync_slots({"tiny": 0}, (), {"tiny"})
    assert (await edge.ask("tiny", "hello")).json()["cold"] is True
    edge.cold.clear()
    return engine


def inner(edge: Edge) -> httpx.AsyncClient:
    """What the ingress uses."""
    transport = httpx.AsyncHTTPTransport(uds=str(edge.layout.inner_door))
    return httpx.AsyncClient(transport=transport, base_url="http://inner", timeout=30)


async def test_a_model_that_is_kept_apart_is_reached_from_the_inner_door_alone(edge: Edge) -> None:
    await edge.add_engine("tiny")
    await edge.runtime.sync_slots({"tiny": 0}, (), {"tiny"})
    assert await edge.runtime.tenants() == {"tiny": 0}
    assert await edge.runtime.apart() == {"tiny"}
    assert (await edge.ask("tiny", "hello")).json()["cold"] is True
    async with inner(edge) as ingress:
        headers = {"x-gateway-model": "tiny"}
        answer = await ingress.post("/v1/chat/completions", json=chat("tiny", "hello"), headers=headers)
        assert answer.json()["model"] == "tiny"
    edge.kill()
    await edge.start()
    assert (await edge.ask("tiny", "hello")).json()["cold"] is True, "also after the edge's restart"
    await edge.runtime.sync_slots({"tiny": 0}, ())
    assert await edge.runtime.apart() == frozenset()
    assert (await edge.ask("tiny", "hello")).json()["model"] == "tiny"


async def test_a_request_from_the_inner_door_is_not_carried_from_a_dying_engine_to_the_next(edge: Edge) -> None:
    engines = [await edge.add_engine("tiny", server=server) for server in range(2)]

    async def one_left() -> bool:
        return sum(engine.child.poll() is None for engine in engines) == 1

    async with inner(edge) as ingress:
        body = chat("tiny", "@crash")
        answer = await ingress.post("/v1/chat/completions", json=body, headers={"x-gateway-model": "tiny"})
    assert "x-gateway-not-routed" in answer.headers
    assert edge.cold == []
    # HAProxy sees the closed connection before the kernel has ended all of the process.
    await until(one_left, "one of the two engines left")


async def test_while_the_ingress_is_away_requests_go_round_it(edge: Edge) -> None:
    engine = await kept_apart(edge)
    edge.kill_ingress()
    began = time.monotonic()
    for number in range(20):
        answer = await edge.ask("tiny", f"hello {number}")
        assert answer.json()["model"] == "tiny", answer.text
    assert time.monotonic() - began < 15.0, "the first finds out, which takes HAProxy a second, not each of them"
    told = {name for name, _ in engine.seen()[-1]["headers"]}
    assert not told & {"x-gateway-edge", "x-gateway-stamp"}, "no engine hears the edge's secret"
    await edge.start_ingress()

    async def through_it() -> bool:
        return "cold" in (await edge.ask("tiny", "hello")).json()

    await until(through_it, "requests go through the ingress again")


async def test_a_request_that_the_ingress_had_when_it_went_away_is_answered(edge: Edge) -> None:
    await kept_apart(edge)
    edge.cold_hangs = True
    asked = [asyncio.create_task(edge.ask("tiny", f"hello {number}")) for number in range(5)]

    async def has_all() -> bool:
        return len(edge.cold) == len(asked)

    await until(has_all, "the ingress has them")
    edge.kill_ingress()
    assert [answer.json()["model"] for answer in await asyncio.gather(*asked)] == ["tiny"] * 5


async def test_an_ingress_that_does_not_answer_its_check_is_gone_round(edge: Edge) -> None:
    """It takes requests, and has no controller."""
    await kept_apart(edge)
    edge.check_status = 500

    async def round_it() -> bool:
        return "cold" not in (await edge.ask("tiny", "hello")).json()

    await until(round_it, "requests go round the ingress")


async def test_what_the_ingress_or_an_engine_answers_is_never_tried_again(edge: Edge) -> None:
    engine = await kept_apart(edge)
    for name in ("tiny", "cold"):
        for status in (500, 503):
            edge.cold.clear()
            edge.cold_statuses = [status]
            answer = await edge.ask(name, "hello")
            assert answer.status_code == status
            assert answer.json()["cold"] is True
            assert len(edge.cold) == 1
    edge.kill_ingress()
    for status in (500, 503):
        before = len(engine.seen())
        answer = await edge.ask("tiny", f"@fail={status}")
        assert answer.status_code == status
        assert "as it was told" in answer.text
        assert len(engine.seen()) == before + 1


async def test_without_ingress_and_engine_a_request_ends(edge: Edge) -> None:
    engine = await kept_apart(edge)
    edge.kill_ingress()
    engine.kill()
    began = time.monotonic()
    answer = await edge.ask("tiny", "hello")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert time.monotonic() - began < 25.0


async def test_who_went_round_the_ingress_is_known_to_it_if_the_engine_dies(edge: Edge) -> None:
    engine = await kept_apart(edge)
    edge.cold_hangs = True
    asked = asyncio.create_task(edge.ask("tiny", "@sleep=20"))

    async def has_it() -> bool:
        return bool(edge.cold)

    await until(has_it, "the ingress has it")
    edge.cold.clear()
    edge.kill_ingress()

    async def at_the_engine() -> bool:
        return len(engine.seen()) > 0

    await until(at_the_engine, "the engine has it")
    edge.cold_hangs = False
    await edge.start_ingress()
    engine.kill()
    assert (await asked).json()["cold"] is True
    assert edge.cold[-1].header("x-gateway-around") == "1"
