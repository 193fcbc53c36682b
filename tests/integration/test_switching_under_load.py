"""Two models, room for one, eight clients at random, engines killed now and then: the promise of the whole project."""

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


@pytest.fixture(scope="module")
def running() -> Iterator[Gateway]:
    models = ("a", "b")
    with gateway(
        lambda memory: {
            name: fake_model(memory, "--load-delay-s", "0.5", "--tokens", "6", concurrency=2) for name in models
        }
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
