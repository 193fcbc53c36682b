"""Watches the progress of one engine: reads its metrics, sends a small request in doubt, reports when it hangs.

The agent decides, not the controller: it has the engine's own counters, can send it a request, is what ends it, and
continues while the controller is away. How much is in flight on an engine without counters it learns from the
controller, which has the edge's counters.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

from gateway_plugin.engine_kinds import Task
from serve.agent.lastwords import summary_of
from serve.agent.probe import Probe, ProbeFailed
from serve.agent.progress import Sample, Verdict, Watch, counters_of, judge, look_every_s, observe
from serve.agent.records import EngineRecord
from serve.agent.sleeping import Reload
from serve.core.events import EngineMoves, EngineStalled

logger = logging.getLogger(__name__)

TOLD_FOR_S = 4.0
"""How long the controller's report that an engine is still counts; it is repeated every second."""
_SAY_EVERY_S = 5.0
"""Between reports of a stalled engine: repeated for a controller that missed the last one."""


@dataclass(frozen=True)
class Why:
    """Why an engine ended, or must be ended."""

    reason: str
    """For administrators: with the engine's own output."""
    summary: str
    """For all users."""
    hung: bool = False
    """Ended by SIGKILL: on SIGTERM it would answer what is in flight with errors first."""
    doubt: bool = False
    """Its sleep or its waking went wrong."""


def in_doubt(reload: Reload) -> Why:
    """Of an engine whose sleep or waking went wrong."""
    return Why(f"in doubt: {reload.reason}", "its sleep or its waking went wrong", doubt=True)


def with_words(why: Why, words: str) -> Why:
    """``why``, with the engine's last output."""
    return replace(
        why, reason=f"{why.reason}: {words}" if words else why.reason, summary=summary_of(why.summary, words)
    )


class ProgressWatch:
    """Progress of one engine, from when it became ready."""

    def __init__(
        self, record: EngineRecord, probe: Probe, report: Callable[[EngineStalled | EngineMoves], None]
    ) -> None:
        self._record = record
        self._probe = probe
        self._report = report
        self._told = (0.0, 0)
        """Time of the controller's last report, and how much is in flight."""
        self._counts = True
        """It has metrics, as far as is known."""
        self._signs = 0
        """Signs of life so far."""
        self._asking: asyncio.Task[None] | None = None
        self._said_at: float | None = None

    def told(self, in_flight: int) -> None:
        """From the edge: nothing has come out of the engine for a while, with this many requests in flight on it; 0:
        something has come out of it after such a while."""
        self._told = (time.monotonic(), in_flight)
        self._signs += in_flight == 0

    async def until_hung(self) -> Why:
        """Returns when the engine must be ended, with the reason; never returns where ``hang_after_s`` is 0."""
        hang_after_s = self._record.hang_after_s
        if hang_after_s <= 0:
            await asyncio.Event().wait()
        watch: Watch | None = None
        try:
            while True:
                watch = observe(watch, await self._look(look_every_s(hang_after_s)))
                now = time.monotonic()
                verdict = judge(watch, now, hang_after_s)
                self._say(watch, now, verdict)
                if verdict is Verdict.HUNG:
                    how = f"hung: no progress for {watch.still_s(now):.0f} s with {requests(watch.in_flight)} in flight"
                    return Why(how, how, hung=True)
                if verdict is not Verdict.WELL and self._asking is None:
                    self._asking = asyncio.create_task(self._ask(hang_after_s))
                await asyncio.sleep(look_every_s(hang_after_s))
        finally:
            if self._asking is not None:
                self._asking.cancel()

    async def _look(self, patience_s: float) -> Sample:
        counters = None
        if self._counts:
            try:
                metrics = await self._probe.metrics(patience_s)
            except ProbeFailed:  # e.g. not in time: no progress
                pass
            else:
                counters = counters_of(metrics or "")
                self._counts = counters is not None
        now = time.monotonic()
        told_at, told = self._told
        return Sample(now, counters, self._signs, told if now < told_at + TOLD_FOR_S else 0)

    async def _ask(self, patience_s: float) -> None:
        """Repeat the request that made it ready. Any answer counts as a sign of life."""
        try:
            task = cast(Task, self._record.task)
            await self._probe.answers(self._record.model, task, patience_s)
            self._signs += 1
        except ProbeFailed as failure:
            logger.info("engine does not answer engine=%s why=%s", self._record.engine, failure.message)
        finally:
            self._asking = None

    def _say(self, watch: Watch, now: float, verdict: Verdict) -> None:
        """Report to the controller (1) that it is stalled, repeatedly, and (2) once, that it makes progress again."""
        record = self._record
        if verdict is Verdict.STALLED:  # (1)
            if self._said_at is None:
                logger.warning("engine stalled engine=%s in_flight=%d", record.engine, watch.in_flight)
            if self._said_at is None or now >= self._said_at + _SAY_EVERY_S:
                self._said_at = now
                still_s = watch.still_s(now)
                self._report(EngineStalled(record.engine, still_s, watch.in_flight))
        elif self._said_at is not None and verdict is not Verdict.HUNG:  # (2)
            self._said_at = None
            logger.info("engine moves again engine=%s", record.engine)
            self._report(EngineMoves(record.engine))


def requests(count: int) -> str:
    """``1 request``, ``3 requests``."""
    return f"{count} request" if count == 1 else f"{count} requests"
