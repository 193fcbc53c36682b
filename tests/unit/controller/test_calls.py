"""Answers of many waiters at once leave the controller room for others."""

from __future__ import annotations

import asyncio

from gateway_plugin.errors import WaitDeadline
from serve.controller.calls import AT_A_TIME, Calls
from serve.core.effects import Answer


async def test_many_answers_come_in_handfuls_and_in_order() -> None:
    calls = Calls()
    futures = [calls.open(str(n)) for n in range(5 * AT_A_TIME)]
    for n in range(len(futures)):
        calls.answer(Answer(str(n)))
    done = 0
    while done < len(futures):
        await asyncio.sleep(0)
        now = sum(future.done() for future in futures)
        assert now - done <= AT_A_TIME, "others have their turn between"
        assert all(future.done() for future in futures[:now])
        done = now


async def test_each_call_gets_its_own_answer_and_a_caller_that_left_none() -> None:
    calls = Calls()
    goes, refused, left, cancelled = (calls.open(ticket) for ticket in "abcd")
    error = WaitDeadline("late", retry_after_s=1.0, state="waiting")
    calls.forget("c")
    for answer in (Answer("a"), Answer("b", error), Answer("c"), Answer("d"), Answer("unknown")):
        calls.answer(answer)
    cancelled.cancel()
    assert await goes is None
    assert await refused is error
    assert not left.done()
    again = calls.open("e")
    calls.answer(Answer("e"))
    assert await again is None
