"""Many streams that came cold pass through the ingress, others wait: status answers, and nothing is replaced or cut."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest

from tests.support.gateways import Gateway, chat_body

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

STREAMS, WAITERS = 200, 100
TOKENS = 60
PATHS = ("/ready", "/v1/models", "/gateway/v1/status")
SLOWEST_S = 10.0


def test_status_answers_beside_cold_streams_and_waiters_and_none_is_cut(running: Gateway) -> None:
    before = running.replicas()
    assert len(before) == 3, before
    asyncio.run(load(running))
    assert running.replicas() == before, "a busy replica was replaced"
    said = running.layout.supervisor_log.read_text()
    assert said.count("action start deploy") == 1, "a busy application was deployed again"


async def load(running: Gateway) -> None:
    over = threading.Event()
    probing = asyncio.create_task(asyncio.to_thread(probe, running, over))
    async with running.async_client(limits=httpx.Limits(max_connections=None), timeout=120) as http:

        async def stream(model: str) -> str:
            body = chat_body(model, f"@tokens={TOKENS}", stream=True, max_tokens=TOKENS)
            async with http.stream("POST", "/v1/chat/completions", json=body) as response:
                text = (await response.aread()).decode()
                return text[-40:].rstrip() if response.status_code == 200 else f"{response.status_code} {text}"

        streams = [asyncio.create_task(stream("slow")) for _ in range(STREAMS)]
        waiters = [asyncio.create_task(stream("never")) for _ in range(WAITERS)]
        try:
            ends = await asyncio.gather(*streams)
        finally:
            over.set()
        assert [end for end in ends if not end.endswith("data: [DONE]")] == []
        for task in waiters:
            task.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
    slowest = await probing
    assert max(slowest.values()) < SLOWEST_S, slowest


def probe(running: Gateway, over: threading.Event) -> dict[str, float]:
    """The slowest answer of each path, in seconds; a client of its own, whom the streams' clients do not hold up."""
    slowest = dict.fromkeys(PATHS, 0.0)
    with running.client() as http:
        while not over.wait(0.2):
            for path in PATHS:
                began = time.monotonic()
                response = http.get(path)
                slowest[path] = max(slowest[path], time.monotonic() - began)
                assert response.status_code == 200, f"{path}: {response.text}"
    return slowest
