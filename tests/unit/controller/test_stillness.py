"""Which engines have requests in flight at the edge and send nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from serve.agent import hanging
from serve.agent.progress import Verdict, Watch, judge, look_every_s, observe
from serve.controller.stillness import STILL_S, Flow, flows, still
from tests.unit.agent.test_progress import VLLM
from tests.unit.controller.test_observer import ENGINE, FLEET, SERVER

BUSY = replace(SERVER, bytes_out=100)
KNOWN = {"e1": Flow(100, 1000.0)}


def test_bytes_and_an_empty_engine_are_progress() -> None:
    assert flows({}, FLEET, [BUSY], 1000.0) == KNOWN
    assert flows(KNOWN, FLEET, [BUSY], 1005.0) == KNOWN
    assert flows(KNOWN, FLEET, [replace(BUSY, bytes_out=101)], 1005.0) == {"e1": Flow(101, 1005.0)}
    assert flows(KNOWN, FLEET, [replace(BUSY, in_flight=0)], 1005.0) == {}


def test_requests_that_come_and_clients_that_leave_are_none() -> None:
    assert flows(KNOWN, FLEET, [replace(BUSY, in_flight=9, total=12)], 1005.0) == KNOWN
    assert flows(KNOWN, FLEET, [replace(BUSY, in_flight=1)], 1005.0) == KNOWN


def test_a_server_that_is_another_engines_says_nothing_of_this_one() -> None:
    assert flows(KNOWN, FLEET, [replace(BUSY, address="127.0.0.1:10")], 1005.0) == {}


def test_its_agent_is_told_after_a_while_what_is_in_flight() -> None:
    fleet = replace(FLEET, engines={"e1": replace(ENGINE, in_flight=4)})
    assert still(fleet, KNOWN, KNOWN, 1000.0 + STILL_S - 0.1) == {}
    assert still(fleet, KNOWN, KNOWN, 1000.0 + STILL_S) == {"n": {"e1": 4}}
    assert still(replace(FLEET, engines={}), KNOWN, KNOWN, 1005.0) == {}


def test_its_agent_is_told_that_it_moves_again() -> None:
    moved = {"e1": Flow(101, 1003.0)}
    assert still(FLEET, KNOWN, moved, 1003.0) == {"n": {"e1": 0}}
    assert still(FLEET, moved, moved, 1004.0) == {}
    assert still(FLEET, KNOWN, {"e1": Flow(101, 1001.0)}, 1001.0) == {}, "it was not still"
    assert still(FLEET, {}, moved, 1003.0) == {}
    assert still(FLEET, KNOWN, {}, 1003.0) == {}, "its callers left: no sign of life"


async def hung_at(
    monkeypatch: pytest.MonkeyPatch, every_s: float, until: float, hang_after_s: float, metrics: str = ""
) -> float | None:
    """When an engine is found to hang whose bytes, as the edge counts them, step ``every_s`` ``until`` then.

    Its counters (``metrics``) stand still, and it serves one request at a time: no small one is answered meanwhile.
    """
    now = 0.0
    monkeypatch.setattr(hanging, "time", SimpleNamespace(monotonic=lambda: now))
    nothing: Any = None
    probe: Any = SimpleNamespace(metrics=AsyncMock(return_value=metrics))
    progress = hanging.ProgressWatch(nothing, probe, nothing)
    known: dict[str, Flow] = {}
    watch: Watch | None = None
    looks_at = 0.0
    for tenth in range(10 * 400):
        now = tenth / 10
        if tenth % 10 == 3:  # the observer
            server = replace(SERVER, bytes_out=int(min(now, until) / every_s))
            before, known = known, flows(known, FLEET, [server], now)
            for engines in still(FLEET, before, known, now).values():
                progress.told(engines["e1"])
        if now >= looks_at:
            looks_at = now + look_every_s(hang_after_s)
            watch = observe(watch, await progress._look(1.0))
            if judge(watch, now, hang_after_s) is Verdict.HUNG:
                return now
    return None


@pytest.mark.parametrize("hang_after_s", [10.0, 60.0, 300.0])
@pytest.mark.parametrize("every_s", [0.5, 5.0, 7.5])
async def test_an_engine_that_sends_something_now_and_then_is_not_ended(
    monkeypatch: pytest.MonkeyPatch, every_s: float, hang_after_s: float
) -> None:
    assert await hung_at(monkeypatch, every_s, 1000.0, hang_after_s) is None
    if every_s > STILL_S:
        assert await hung_at(monkeypatch, every_s, 1000.0, hang_after_s, VLLM) is None


@pytest.mark.parametrize("hang_after_s", [4.0, 60.0])
async def test_one_that_sends_nothing_more_is_ended_soon(monkeypatch: pytest.MonkeyPatch, hang_after_s: float) -> None:
    ended = await hung_at(monkeypatch, 0.5, 20.0, hang_after_s)
    assert ended is not None
    assert hang_after_s <= ended - 20.0 <= hang_after_s + STILL_S + 4.0
