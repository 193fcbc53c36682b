"""What the ingress asks the controller about a model's engines, and how often."""

from __future__ import annotations

import asyncio
from typing import Any

from serve.ingress.waiting import Waiting
from tests.support.controllers import ScriptedController


class Gated(ScriptedController):
    """Says of each question when it was asked: the deaths that were known then. Answers once ``gate`` is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.questions = 0

    async def _outlook(self, model: str) -> dict[str, Any]:
        self.questions += 1
        known = await super()._outlook(model)
        await self.gate.wait()
        return known


async def test_waiters_that_are_let_go_at_once_share_a_question() -> None:
    controller = Gated()
    waiting = Waiting(controller, 10.0)
    first = [asyncio.create_task(waiting.history("m")) for _ in range(200)]
    await asyncio.sleep(0)
    other = asyncio.create_task(waiting.history("n"))
    controller.gate.set()
    assert {history.name for history in await asyncio.gather(*first)} == {"m"}
    assert (await other).name == "n"
    assert controller.questions == 2, "one a model"
    assert not waiting._looks
    assert not waiting._looking


async def test_no_caller_gets_an_answer_that_is_older_than_its_question() -> None:
    controller = Gated()
    waiting = Waiting(controller, 10.0)
    early = asyncio.create_task(waiting.history("m"))
    while not controller.questions:
        await asyncio.sleep(0)
    controller.deaths.append(7.0)
    late = [asyncio.create_task(waiting.history("m")) for _ in range(200)]
    await asyncio.sleep(0)
    controller.gate.set()
    assert (await early).deaths == ()
    assert {(await task).deaths for task in late} == {(7.0,)}
    assert controller.questions == 2


async def test_a_caller_that_leaves_takes_nobodys_answer_along() -> None:
    controller = Gated()
    waiting = Waiting(controller, 10.0)
    leaves, stays = (asyncio.create_task(waiting.history("m")) for _ in range(2))
    while not controller.questions:
        await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.wait({leaves})
    controller.gate.set()
    assert (await stays).name == "m"
