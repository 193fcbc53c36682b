"""Two models, room for one, eight clients at random, engines killed now and then: the promise of the whole project.
And how long models wait for each other's room where clients alternate between them."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from tests.support.gateways import Gateway, chat_body, fake_model, gateway

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

SECONDS = 40.0
CLIENTS = 8
KILL_EVERY_S = 8.0
LOAD_S = 0.5
START_S = 4.5
"""From an eviction until the other engine serves: its stop, the start of a process on a busy machine, the load."""
TURNS = 6
BOUND_S = 10.0
"""For waits; four loads of a fake engine are less, even on a busy machine."""
WATCHED_S = 16.0


@pytest.fixture(scope="module")
def running() -> Iterator[Gateway]:
    models = ("a", "b")
    with gateway(
        lambda memory: {
            name: fake_model(memory, "--load-delay-s", str(LOAD_S), "--tokens", "6", concurrency=2) for name in models
        },
        limits={"max_wait_s": BOUND_S},
    ) as made:
        yield made


@dataclass
class Tally:
    """What the clients saw."""

    answered: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    cut: list[float] = field(default_factory=list)
    """When streams broke off."""
    kills: list[float] = field(default_factory=list)
    engines_at_once: int = 0


async def _client(number: int, client: httpx.AsyncClient, tally: Tally, until: float) -> None:
    choice = random.Random(number)
    while time.monotonic() < until:
        model = choice.choice(("a", "b"))
        stream = choice.random() < 0.3
        prompt = "@sleep=0.05" if choice.random() < 0.3 else "hello"
        try:
            async with client.stream(
                "POST", "/v1/chat/completions", json=chat_body(model, prompt, stream=stream)
            ) as response:
                body = (await response.aread()).decode()
        except (httpx.RemoteProtocolError, httpx.ReadError):  # broken off, or reset: visible either way
            tally.cut.append(time.monotonic())
            continue
        whole = body.rstrip().endswith("data: [DONE]") if stream else f"{model} pid=" in body
        if response.status_code == 200 and whole:
            tally.answered[model] += 1
        else:
            tally.failed.append(f"{response.status_code} {body[:300]}")


async def _killer(running: Gateway, tally: Tally, until: float) -> None:
    choice = random.Random(0)
    while time.monotonic() + KILL_EVERY_S < until:
        await asyncio.sleep(KILL_EVERY_S)
        pids = running.engine_pids()
        if pids:
            tally.kills.append(time.monotonic())
            try:
                os.killpg(pids[choice.choice(sorted(pids))], signal.SIGKILL)
            except ProcessLookupError:
                tally.kills.pop()


async def _watch(running: Gateway, tally: Tally, until: float) -> None:
    while time.monotonic() < until:
        tally.engines_at_once = max(tally.engines_at_once, len(running.engine_pids()))
        await asyncio.sleep(0.02)


async def test_no_request_is_lost_while_models_are_switched_and_engines_killed(running: Gateway) -> None:
    tally = Tally()
    until = time.monotonic() + SECONDS
    limits = httpx.Limits(max_connections=CLIENTS)
    async with running.async_client(limits=limits) as client:
        await asyncio.gather(
            *(_client(number, client, tally, until) for number in range(CLIENTS)),
            _killer(running, tally, until),
            _watch(running, tally, until),
        )
    status = running.status()
    total = sum(tally.answered.values())
    print(
        f"{total} answered {dict(tally.answered)}, {len(tally.failed)} failed, {len(tally.cut)} cut, "
        f"{len(tally.kills)} kills, {status['switches']} switches"
    )
    assert not tally.failed, tally.failed[:5]
    for at in tally.cut:  # a stream may be cut by a kill, never by a switch
        assert any(0 <= at - kill < 3.0 for kill in tally.kills), "a stream was cut although nothing was killed"
    assert len(tally.cut) <= len(tally.kills) * CLIENTS
    assert min(tally.answered.values()) > 20
    assert 2 <= status["switches"] < total / 4
    assert tally.engines_at_once == 1, "memory was over-committed"
    assert status["waiting"] == 0


@dataclass
class Waits:
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
    account = Waits()

    async def alternate(client: httpx.AsyncClient, first: int) -> None:
        for turn in range(TURNS):
            await account.ask(client, "ab"[(first + turn) % 2])

    before = running.status()["switches"]
    async with running.async_client(timeout=120) as client:
        await asyncio.gather(*(alternate(client, number % 2) for number in range(8)))
    switches = running.status()["switches"] - before
    print(f"{account.count()} answered, {switches} switches")
    assert not account.failed, account.failed[:5]
    assert account.count() == 8 * TURNS
    assert switches <= 2 * TURNS, "each request of a client that alternates needs one at most, and all share it"


async def test_one_client_that_alternates_pays_a_load_each_time_and_no_more(running: Gateway) -> None:
    account = Waits()
    async with running.async_client(timeout=120) as client:
        await account.ask(client, "a")
        before = running.status()["switches"]
        for turn in range(TURNS):
            await account.ask(client, "ba"[turn % 2])
    switches = running.status()["switches"] - before
    waits = sorted(end - sent for model in ("a", "b") for sent, end in account.answered[model][-TURNS // 2 :])
    print(f"{switches} switches, waits {[round(wait, 1) for wait in waits]}")
    assert not account.failed, account.failed[:5]
    assert switches == TURNS
    assert waits[len(waits) // 2] < LOAD_S + START_S


async def test_a_cold_model_is_answered_within_the_bound_while_a_hot_one_goes_on(running: Gateway) -> None:
    """Eight clients keep ``a`` busy with requests of 2 s; one request for ``b`` comes."""
    account = Waits()

    async def keep_busy(client: httpx.AsyncClient, until: float) -> None:
        while time.monotonic() < until:
            await account.ask(client, "a", "@sleep=2")

    async with running.async_client(timeout=60) as client:
        await account.ask(client, "a")
        began = time.monotonic()
        busy = [asyncio.create_task(keep_busy(client, began + WATCHED_S)) for _ in range(CLIENTS)]
        await asyncio.sleep(3)
        await account.ask(client, "b")
        await asyncio.gather(*busy)
    assert not account.failed, account.failed[:5]
    ((sent, answered),) = account.answered["b"]
    after = sum(begun > answered for begun, _ in account.answered["a"])
    print(
        f"the cold one waited {answered - sent:.1f} s; {after} of {len(account.answered['a'])} answers of the hot later"
    )
    assert answered - sent < BOUND_S
    assert after > 0, "the hot one's clients had to leave first"
