"""One engine process, watched from its start until it and all of its child processes are gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

from gateway_plugin.engine_kinds import Task
from gateway_plugin.masking import masked
from gateway_plugin.paths import Layout
from gateway_plugin.processes import age_s, alive, end_words
from serve.agent import records
from serve.agent.devices import Devices, Lease
from serve.agent.hanging import ProgressWatch, Why, in_doubt, with_words
from serve.agent.lastwords import last_words
from serve.agent.probe import Health, Probe, ProbeFailed
from serve.agent.processes import end_engine, tail
from serve.agent.records import EngineRecord
from serve.agent.sleeping import Reload
from serve.agent.timing import Timing
from serve.agent.warm import Gauges, WarmTier
from serve.core.events import (
    EngineAsleep,
    EngineAwake,
    EngineExited,
    EngineGrew,
    EngineListening,
    EngineMoves,
    EngineReady,
    EngineStalled,
    FoundEngine,
)

EngineEvent = (
    EngineListening | EngineReady | EngineAsleep | EngineAwake | EngineGrew | EngineStalled | EngineMoves | EngineExited
)
"""Callback for reports on an engine."""

logger = logging.getLogger(__name__)

_GAUGES = Gauges()


class EngineProcess:
    """Watches one engine, its own child or one adopted from an earlier agent, until it is gone."""

    def __init__(
        self,
        layout: Layout,
        record: EngineRecord,
        probe: Probe,
        report: Callable[[EngineEvent], None],
        child: subprocess.Popen[bytes] | None,
        timing: Timing,
        devices: Devices,
        lease: Lease | None = None,
        names: tuple[str, ...] = (),
        gauges: Gauges = _GAUGES,
        recorded: bool = True,
    ) -> None:
        """``lease``: its GPUs, taken for its load; ``None``: adopted. ``names``: the node's own names of its GPUs."""
        self.record = record
        self.settled = asyncio.Event()
        """Set when the real request was sent, or the engine is gone."""
        self._layout = layout
        self._probe = probe
        self._report = report
        self._child = child
        self._timing = timing
        self._recorded = recorded
        """The record on disk equals the one here."""
        self._listening = False
        self._ready = False
        self._health = Health(False, "not asked yet")
        self._stop = asyncio.Event()
        self._stop_reason = ""
        self._progress = ProgressWatch(record, probe, report)
        self._devices = devices
        self._lease = lease
        self._warm = WarmTier(probe, lambda: self.record, self._update, devices, names, gauges, timing.patience)
        self._sleep_asked, self._wake_asked = asyncio.Event(), asyncio.Event()

    def found(self) -> FoundEngine:
        """State of the engine, as reported to the controller."""
        return FoundEngine(
            id=self.record.engine,
            model=self.record.model,
            gpus=self.record.gpus,
            memory_mib=self.record.memory_mib,
            started=time.time() - age_s(self.record.mark),
            address=self.record.address if self._listening else "",
            ready=self._ready and not self.record.sleep and not self._stop.is_set(),
            loaded_s=self.record.loaded_s,
            asleep=self.record.sleep == "asleep",
            can_sleep=self._warm.possible,
            sleep_mib=self.record.sleep_mib,
            kept_mib=self.record.kept_mib,
            under_way="" if not self._ready or self.record.sleep == "asleep" else self.record.sleep,
        )

    def stop(self, reason: str) -> None:
        """Request its end; ``run`` carries it out and reports."""
        self._stop_reason = self._stop_reason or reason
        self._stop.set()

    def sleep(self) -> None:
        """Put it to sleep; ``run`` carries it out and reports. Asked again, it only reports."""
        if self.record.sleep == "asleep":
            self._report(EngineAsleep(self.record.engine, self.record.sleep_mib, 0.0, self.record.kept_mib))
        elif not self.record.sleep:
            self._sleep_asked.set()

    def wake(self) -> None:
        """Wake it; ``run`` carries it out and reports. Asked again, it only reports."""
        if self._ready and not self.record.sleep:
            self._report(EngineAwake(self.record.engine, 0.0))
        elif self.record.sleep == "asleep":
            self._wake_asked.set()

    def told(self, in_flight: int) -> None:
        """Stillness from the edge: requests in flight on it while it has been sending nothing."""
        self._progress.told(in_flight)

    async def run(self) -> None:
        """Watch until it and all of its group are gone; then remove its record and report ``EngineExited``."""
        attending = asyncio.create_task(self._attend())
        try:
            why = await self._until_over(attending)
        finally:
            attending.cancel()
            await asyncio.gather(attending, return_exceptions=True)
            await self._probe.close()
        expected = self._stop.is_set()
        at_once = why is not None and why.hung and not expected
        if self._lease is not None:
            self._lease.release()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timing.device_wait_s if expected else 0):
                self._lease = await self._devices.take(self.record.gpus)
        try:
            await self._end(self._timing.grace_s if not at_once else 0.0)
        finally:
            if self._lease is not None:
                self._lease.release()
        await asyncio.to_thread(records.remove, self._layout, self.record.engine)
        words = last_words(tail(Path(self.record.log)), self._secrets)
        why = self._told(words) if expected else with_words(why or self._how_it_ended(), words)
        logger.info("engine gone engine=%s pid=%d expected=%s", self.record.engine, self.record.pid, expected)
        self.settled.set()
        self._report(self._exited(why, expected))

    async def _end(self, grace_s: float) -> None:
        """End its process group, and take note of its end."""
        await end_engine(self.record, grace_s, self._child)
        deadline = time.monotonic() + self._timing.grace_s
        while self._child is not None and self._child.poll() is None:
            if time.monotonic() > deadline:
                self._child.kill()  # its isolation wrapper was stopped
            await asyncio.sleep(0.01)  # its last thread exits; and no zombie is left

    @property
    def _secrets(self) -> tuple[str, ...]:
        return (self.record.key, *self.record.secrets)

    def _exited(self, why: Why, expected: bool) -> EngineExited:
        reason = masked(why.reason, self._secrets)
        return EngineExited(self.record.engine, reason, expected, why.summary, doubt=why.doubt and not expected)

    async def _until_over(self, attending: asyncio.Task[Why]) -> Why | None:
        """Wait until a stop is requested, or it died (``None``), or it must be ended (the reason)."""
        while not self._stop.is_set() and self._runs():
            if not self._recorded:
                self._keep_record()
            if attending.done():
                failed = attending.exception()
                if failed is None:
                    return attending.result()
                return Why(f"its agent could not watch it: {failed!r}", "its agent could not watch it")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), self._timing.poll_s)
        return None

    def _runs(self) -> bool:
        if self._child is not None and self._child.pid == self.record.pid:
            return self._child.poll() is None
        return alive(self.record.mark)

    async def _attend(self) -> Why:
        """Wait for the load, then check its health, put it to sleep and wake it as it is asked to.

        Returns the reason why it must be ended. One whose agent was lost while it fell asleep or woke is in doubt.
        """
        why = None
        if self.record.sleep:  # adopted
            self._listening = self._ready = True
            self.settled.set()
            if self.record.sleep != "asleep":
                why = in_doubt(Reload("its agent was lost while it fell asleep or woke"))
        else:
            if self._lease is None and not self.record.ready:
                self._lease = await self._devices.take(self.record.gpus)
            why = await self._load()
            if self._lease is not None:
                self._lease.release()
        while why is None:
            if self.record.sleep != "asleep":
                why = await self._serve() or await self._turn(self._warm.fall_asleep)
                continue
            self._wake_asked.clear()
            await self._wake_asked.wait()
            why = await self._turn(self._warm.wake)
        return why

    async def _turn(self, act: Callable[[], Awaitable[EngineAsleep | EngineAwake | Reload]]) -> Why | None:
        """Put it to sleep or wake it, and report."""
        result = await act()
        if isinstance(result, Reload):
            return in_doubt(result)
        self._report(result)
        return None

    async def _load(self) -> Why | None:
        """Wait until it answers its one real request, and has slept once if it is to."""
        while not await self._probe.listening():  # noqa: ASYNC110
            await asyncio.sleep(self._timing.poll_s)
        self._listening = True
        self._report(EngineListening(self.record.engine, self.record.address))
        pause_s = self._timing.poll_s
        while True:
            if (await self._look()).ok:
                failure = await self._ask()
                if not failure:
                    break
                if not self.record.ready:
                    return Why(failure, "it did not answer its first request")
                # Adopted: it may just be very busy; the controller has a deadline.
                self._health = Health(False, failure)
            await asyncio.sleep(pause_s)
            pause_s = min(self._timing.probe_max_s, pause_s * 1.5)
        await self._warm.prepare()
        if self._warm.possible and self.record.sleep_mib and not self.record.slept:
            doubt = await self._warm.sleep_once()
            if doubt is not None:
                return in_doubt(doubt)
        self._now_ready(await self._probe.max_model_len(), await self._warm.measure())
        return None

    async def _serve(self) -> Why | None:
        """Watch it while it serves, until it must be ended (the reason) or is asked to sleep (``None``)."""
        self._sleep_asked.clear()
        asked = asyncio.create_task(self._sleep_asked.wait())
        ends = [asyncio.create_task(self._until_ill()), asyncio.create_task(self._progress.until_hung())]
        grows = asyncio.create_task(self._warm.watch(self._timing.measure_every_s, self._report))
        watches: list[asyncio.Task[Any]] = [asked, *ends]
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            over = next((end for end in ends if end in done), None)
            if over is not None:
                return over.result()
            return None if self._warm.possible else in_doubt(Reload("it cannot be put to sleep"))
        finally:
            for watch in (*watches, grows):
                watch.cancel()
            await asyncio.gather(*watches, grows, return_exceptions=True)

    async def _ask(self) -> str:
        """Its one real request. ``""``: answered; else the failure."""
        try:
            task = cast(Task, self.record.task)
            await self._probe.ask(self.record.model, task, self._timing.first_answer_s)
        except ProbeFailed as failure:
            return failure.message
        return ""

    def _now_ready(self, length: int | None, measured: tuple[int, int]) -> None:
        loaded_s = self.record.loaded_s
        if loaded_s is None:
            loaded_s = age_s(self.record.mark)
        self._update({"ready": True, "loaded_s": loaded_s})
        self._ready = True
        logger.info("engine ready engine=%s pid=%d load_s=%.1f", self.record.engine, self.record.pid, loaded_s)
        record = self.record
        slept_mib = record.sleep_mib if record.slept else 0
        can_sleep = self._warm.possible
        self._report(EngineReady(record.engine, record.address, loaded_s, length, can_sleep, slept_mib, *measured))
        self.settled.set()

    def _update(self, changes: dict[str, Any]) -> None:
        self.record = self.record.model_copy(update=changes)
        self._keep_record()

    def _keep_record(self) -> None:
        """Write its record. On a full disk it serves without one, and the write is retried."""
        try:
            records.write(self._layout, self.record)
        except OSError as error:
            if self._recorded:
                logger.warning("engine not recorded engine=%s why=%s", self.record.engine, error)
            self._recorded = False
        else:
            self._recorded = True

    async def _until_ill(self) -> Why:
        well_at = time.monotonic()
        while True:
            await asyncio.sleep(self._timing.health_every_s)
            if (await self._look()).ok:
                well_at = time.monotonic()
            elif time.monotonic() - well_at >= self._timing.ill_after_s:
                hung = f"hung: no good health for {time.monotonic() - well_at:.0f} s"
                return Why(f"{hung} ({self._health.why})", hung, hung=True)

    async def _look(self) -> Health:
        self._health = await self._probe.health(self._timing.health_timeout_s)
        return self._health

    def _told(self, words: str) -> Why:
        """Why it was stopped, and how far its load had got if it never became ready."""
        if self._ready:
            return Why(self._stop_reason, self._stop_reason)
        stage = self._health.why if self._listening else "never listened"
        how = f"{self._stop_reason}; it was not ready"
        return with_words(Why(f"{how} ({stage})", how), words)

    def _how_it_ended(self) -> Why:
        code = self._child.returncode if self._child is not None else None
        if code is not None and code > 128 and self._child is not None and self._child.pid != self.record.pid:
            code = 128 - code  # the wrapper reports it as shells do
        how = "it ended"
        if code is not None and code >= 0:
            how = f"it ended with exit code {code}"
        elif code is not None:
            how = f"it was {end_words(code)}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
        return Why(how, how, doubt=self.record.sleep in ("sleep", "wake"))
