"""How long models wait for each other's room on a whole gateway: a busy one and a cold one, clients that alternate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from tests.support.gateways import Gateway, chat_body, fake_model, gateway

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

LOAD_S = 0.5
START_S = 2.5
"""From an eviction until the other engine serves: its stop, the start of a process on a busy machine, the load."""
BOUND_S = 12.0
ROUNDS = 10


@pytest.fixture(scope="module")
def running() -> Iterator[Gateway]:
    names = ("hot", "cold", "a", "b")
    with gateway(
        lambda memory: {name: fake_model(memory, "--load-delay-s", str(LOAD_S), "--tokens", "2") for name in names},
    ) as made:
        yield made


@dataclass
class Account:
    """Answers by model: when each request was sent and when its answer was whole (monotonic seconds)."""

    answered: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    async def ask(self, client: httpx.AsyncClient, model: str, prompt: str = "hello") -> None:
        sent = time.monotonic()
        try:
            answer = await client.post("/v1/chat/completions", json=chat_body(model, prompt))
        except httpx.HTTPError as error:
            self.failed.append(f"{model}: {type(error).__name__} after {time.monotonic() - sent:.1f} s")
            return
        if answer.status_code == 200 and f"{model} pid=" in answer.text:
            self.answered.setdefault(model, []).append((sent, time.monotonic()))
        else:
            self.failed.append(f"{model}: {answer.status_code} {answer.text[:200]}")

    def count(self) -> int:
        return sum(map(len, self.answered.values()))


async def test_clients_that_alternate_between_two_models_lose_nothing_and_share_the_switches(running: Gateway) -> None:
    """Room for one; eight clients, half of which begin with the other model: a switch serves all that wait for it."""
    account = Account()

    async def alternate(client: httpx.AsyncClient, first: int) -> None:
        for turn in range(ROUNDS):
            await account.ask(client, "ab"[(first + turn) % 2])

    before = running.status()["switches"]
    async with running.async_client(timeout=120) as client:
        await asyncio.gather(*(alternate(client, number % 2) for number in range(8)))
    switches = running.status()["switches"] - before
    print(f"{account.count()} answered, {switches} switches")
    assert not account.failed, account.failed[:5]
    assert account.count() == 8 * ROUNDS
    assert switches <= 2 * ROUNDS, "each request of a client that alternates needs one at most, and all share it"


async def test_one_client_that_alternates_pays_a_load_each_time_and_no_more(running: Gateway) -> None:
    account = Account()
    async with running.async_client(timeout=120) as client:
        await account.ask(client, "a")
        before = running.status()["switches"]
        for turn in range(8):
            await account.ask(client, "ba"[turn % 2])
    switches = running.status()["switches"] - before
    waits = sorted(end - sent for model in ("a", "b") for sent, end in account.answered[model][-4:])
    print(f"{switches} switches, waits {[round(wait, 1) for wait in waits]}")
    assert not account.failed, account.failed[:5]
    assert switches == 8
    assert waits[len(waits) // 2] < LOAD_S + START_S
