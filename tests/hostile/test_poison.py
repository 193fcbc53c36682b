"""One request that kills its engine: everybody else is answered, and it is refused before it does so again."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import openai
import pytest

from serve.ingress.trials import KILLS_MAX
from tests.support.gateways import Gateway

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def deaths(running: Gateway, model: str) -> int:
    """Engines of ``model`` that died without being told to."""
    lines = running.layout.controller_files.events.read_text().splitlines()
    events = [json.loads(line) for line in lines if '"EngineExited"' in line]
    return sum(event["engine"].startswith(f"{model}-") and not event["expected"] for event in events)


def told(done: list[Future[httpx.Response]]) -> list[str]:
    """What went wrong: status and words of every answer that is none."""
    answers = [one.result() for one in done]
    return [f"{answer.status_code} {answer.text[:200]}" for answer in answers if answer.status_code != 200]


def refused(response: httpx.Response) -> bool:
    return response.status_code == 500 and response.json()["error"]["code"] == "request_killed_engine"


def test_a_poison_beside_thirty_is_the_only_one_refused(running: Gateway) -> None:
    assert running.chat("beside").status_code == 200
    with ThreadPoolExecutor(64) as pool:
        innocents = [pool.submit(running.chat, "beside", f"@sleep=1 {number}") for number in range(30)]
        time.sleep(0.5)
        poison = pool.submit(running.chat, "beside", "@crash")
        time.sleep(1.0)
        innocents += [pool.submit(running.chat, "beside", f"next {n}", stream=True) for n in range(30)]
        assert told(innocents) == []
        assert refused(poison.result())
    assert 1 <= deaths(running, "beside") <= KILLS_MAX


def test_a_poison_now_and_then_costs_no_innocent_its_answer(running: Gateway) -> None:
    assert running.chat("steady").status_code == 200
    innocents, poisons = [], []
    with ThreadPoolExecutor(128) as pool:
        for number in range(80):
            innocents.append(pool.submit(running.chat, "steady", f"@sleep=0.2 {number}"))
            if number % 40 == 20:
                poisons.append(pool.submit(running.chat, "steady", f"@crash {number}"))
            time.sleep(0.1)
        assert told(innocents) == []
        assert all(refused(poison.result()) for poison in poisons)
    assert 1 <= deaths(running, "steady") <= KILLS_MAX * len(poisons)


def test_a_poison_through_the_openai_client_takes_nobody_down(running: Gateway) -> None:
    assert running.chat("retries").status_code == 200
    with (
        openai.DefaultHttpxClient(verify=running.trust, timeout=60) as transport,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key=running.key, http_client=transport) as client,
        ThreadPoolExecutor(16) as pool,
    ):
        innocents = [pool.submit(running.chat, "retries", f"@sleep=1 {number}") for number in range(10)]
        for _ in range(3):
            with pytest.raises(openai.InternalServerError, match="on nothing else"):
                client.chat.completions.create(model="retries", messages=[{"role": "user", "content": "@crash"}])
        assert told(innocents) == []
    assert 1 <= deaths(running, "retries") <= KILLS_MAX
    assert running.chat("retries").status_code == 200
