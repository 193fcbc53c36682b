"""Many streams that came cold pass through the ingress, others wait: status answers, and nothing is replaced or cut."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from tests.support.gateways import Gateway, chat_body, fake_model, gateway

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

STREAMS, WAITERS = 200, 100
TOKENS, RATE = 100, 10
SLOWEST_S = 2.0


def test_status_answers_beside_cold_streams_and_waiters_and_none_is_cut() -> None:
    with gateway(
        lambda memory: {
            "slow": fake_model(memory, "--load-delay-s", "3", "--token-rate", str(RATE), memory_gib=0.5),
            "never": fake_model(memory, "--load-delay-s", "3000", memory_gib=0.5),
        }
    ) as running:
        before = replicas(running)
        assert len(before) == 4, before
        asyncio.run(load(running))
        assert replicas(running) == before, "a busy replica was replaced"
        said = running.layout.supervisor_log.read_text()
        assert said.count("action start deploy") == 1, "a busy application was deployed again"


def replicas(running: Gateway) -> dict[str, int]:
    """Serve's proxy and the application's replicas: name -> PID."""
    found = {}
    for process in running.processes():
        name = " ".join(process.cmdline()[:1])
        if name.startswith(("ray::ServeReplica:", "ray::ProxyActor")):
            found[name.partition(".")[0]] = process.pid
    return found


async def load(running: Gateway) -> None:
    limits = httpx.Limits(max_connections=None)
    begun = asyncio.Event()
    async with running.async_client(limits=limits, timeout=120) as http:

        async def stream(model: str) -> str:
            body = chat_body(model, f"@tokens={TOKENS}", stream=True, max_tokens=TOKENS)
            async with http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    return f"{response.status_code} {(await response.aread()).decode()}"
                end = ""
                async for text in response.aiter_text():
                    begun.set()
                    end = (end + text)[-40:]
                return end.rstrip()

        streams = [asyncio.create_task(stream("slow")) for _ in range(STREAMS)]
        waiters = [asyncio.create_task(stream("never")) for _ in range(WAITERS)]
        await begun.wait()
        took: dict[str, float] = {"/ready": 0.0, "/v1/models": 0.0, "/gateway/v1/status": 0.0}
        while not all(task.done() for task in streams):
            for path in took:
                began = time.monotonic()
                response = await http.get(path)
                took[path] = max(took[path], time.monotonic() - began)
                assert response.status_code == 200, f"{path}: {response.text}"
            await asyncio.sleep(0.2)
        ends = [task.result() for task in streams]
        assert [end for end in ends if not end.endswith("data: [DONE]")] == []
        for task in waiters:
            task.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
    assert max(took.values()) < SLOWEST_S, took
