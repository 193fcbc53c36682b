"""Engines whose /health is good while nothing is computed: ended in time, and those who waited are answered."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from tests.hostile.conftest import HANG_S, WEDGED
from tests.support.gateways import Gateway, chat_body

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

CALLERS = 20


async def stalled(client: httpx.AsyncClient, model: str) -> dict[str, object]:
    """The model's entry once it says that it is stalled."""
    while True:
        found: dict[str, object] = (await client.get(f"/v1/models/{model}")).json()
        if found["state"] == "stalled":
            return found
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("model", WEDGED)
async def test_a_wedged_engine_is_ended_and_those_on_it_are_answered_by_the_next(running: Gateway, model: str) -> None:
    async with running.async_client(timeout=60) as client:
        first = (await client.post("/v1/chat/completions", json=chat_body(model))).text
        before = running.engine_pids()
        with pytest.raises(httpx.ReadTimeout):  # its caller leaves: nothing but the engine remembers it
            await client.post("/v1/chat/completions", json=chat_body(model, "@wedge"), timeout=0.5)
        began = time.monotonic()
        saying = asyncio.create_task(asyncio.wait_for(stalled(client, model), HANG_S + 40))
        calls = [client.post("/v1/chat/completions", json=chat_body(model, f"hello {n}")) for n in range(CALLERS)]
        answers = await asyncio.gather(*calls)
        took_s = time.monotonic() - began
        said = await saying
    print(f"{model}: {len(answers)} answered {took_s:.1f} s after the engine was wedged; meanwhile: {said['reason']}")
    assert [answer.status_code for answer in answers] == [200] * CALLERS
    pids = {answer.text.partition("pid=")[2].split()[0] for answer in answers}
    assert len(pids) == 1
    assert not any(f"pid={pid}" in first for pid in pids), "by the next engine"
    assert HANG_S <= took_s < HANG_S + 40
    assert str(said["reason"]).startswith("no progress for ")
    assert str(said["reason"]).endswith(f"requests in flight; ended at {HANG_S:.0f} s")
    assert not set(before.values()) & {pid for name, pid in running.engine_pids().items() if name.startswith(model)}


async def test_one_request_that_takes_long_is_no_hang_of_an_engine_that_does_not_count(running: Gateway) -> None:
    """Nothing comes out of it for longer than ``hang_after``, but it answers a small request."""
    async with running.async_client(timeout=60) as client:
        before = (await client.post("/v1/chat/completions", json=chat_body("plain"))).text.partition("pid=")[2]
        body = chat_body("plain", f"@sleep={3 * HANG_S}")
        after = (await client.post("/v1/chat/completions", json=body)).text.partition("pid=")[2]
    assert before.split()[0] == after.split()[0]
