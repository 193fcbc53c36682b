"""Sleep and wake of one engine at the controller's command: what is recorded, what is reported.

``sleeping.py`` knows how an engine sleeps and when it is in doubt; this module measures what it holds meanwhile, and
keeps its record on disk in step, so that the next agent finds it asleep, or in doubt if it was lost in between.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

from gateway_plugin.engine_kinds import Task
from gateway_plugin.processes import Mark
from serve.agent.argv import device_names, visible_devices
from serve.agent.devices import Devices
from serve.agent.host_memory import asleep_mib, available_mib, held_mib, taken_mib
from serve.agent.measured import cache_tokens, device_mib_of
from serve.agent.node import DevicesUnseen
from serve.agent.probe import Probe, ProbeFailed
from serve.agent.records import EngineRecord
from serve.agent.sleeping import Asleep, Canary, Mib, Patience, Reload, Sleeper, used_mib_of
from serve.core.effects import StartEngine
from serve.core.events import EngineAsleep, EngineAwake, EngineGrew

logger = logging.getLogger(__name__)

_METRICS_S = 5.0
_GROWN = 1.05


@dataclass(frozen=True)
class Gauges:
    """How memory is read."""

    used_mib: Callable[[tuple[str, ...]], Awaitable[Mib]] = used_mib_of
    """In use on these GPUs, by the batch system's names for them."""
    available_mib: Callable[[], int] = available_mib
    """What is left of the host's."""
    held_mib: Callable[[Mark], int] = held_mib
    """Of the host's, what an engine's processes hold for themselves alone."""
    taken_mib: Callable[[Mark], int] = taken_mib
    """Of the host's, what an engine's processes hold, what they share counted once."""
    device_mib: Callable[[Mark], Awaitable[int]] = device_mib_of
    """Of one GPU's, the most that an engine's processes hold."""


async def measure_bare(command: StartEngine, gauges: Gauges) -> Mib:
    """Memory in use on an engine's GPUs before it starts. ``()``: it does not sleep, or their memory cannot be read (no
    NVIDIA GPU, a part of one): then it is not started for sleep, which could not be checked."""
    if not command.model.sleeps or not command.gpus:
        return ()
    try:
        return await gauges.used_mib(device_names(command.gpus, visible_devices(os.environ)))
    except DevicesUnseen as unseen:
        logger.warning("engine cannot sleep engine=%s why=%s", command.engine, unseen)
        return ()


class WarmTier:
    """One engine's sleeps."""

    def __init__(
        self,
        probe: Probe,
        record: Callable[[], EngineRecord],
        update: Callable[[dict[str, Any]], None],
        devices: Devices,
        names: tuple[str, ...],
        gauges: Gauges,
        patience: Patience,
    ) -> None:
        """``record``, ``update``: the engine's record as it is; new values for it, also on disk. ``names``: of its
        GPUs."""
        made = record()
        self._probe = probe
        self._most_mib = 0
        """The most that it was seen to hold of the host."""
        self._record = record
        self._update = update
        self._devices = devices
        self._gauges = gauges
        task = cast(Task, made.task)
        self._sleeper = Sleeper(probe, made.model, task, lambda: gauges.used_mib(names), patience)

    @property
    def possible(self) -> bool:
        """It was started for it, and its answer to the canary is known."""
        return self._record().canary_noted

    async def measure(self) -> tuple[int, int]:
        """Once it is loaded: ``used_mib`` and ``kv_tokens`` of ``EngineReady``; 0 for each that is not known. What its
        record has of its GPUs was measured while nothing else changed there."""
        record = self._record()
        try:
            tokens = cache_tokens(await self._probe.metrics(_METRICS_S) or "")
        except ProbeFailed:
            tokens = 0
        if record.gpus:
            return record.held_mib or await self._gauges.device_mib(record.mark), tokens
        self._most_mib = await asyncio.to_thread(self._gauges.taken_mib, record.mark)
        return self._most_mib, tokens

    async def watch(self, every_s: float, report: Callable[[EngineGrew], None]) -> None:
        """While it serves: report each time that it holds a twentieth more of the host than it ever did: pages of a
        cache count once they are used. vLLM takes all that it will of a GPU before it is ready."""
        record = self._record()
        while not record.gpus:
            await asyncio.sleep(every_s)
            held_mib = await asyncio.to_thread(self._gauges.taken_mib, record.mark)
            if held_mib > self._most_mib * _GROWN:
                self._most_mib = held_mib
                report(EngineGrew(record.engine, held_mib))

    async def prepare(self) -> None:
        """After loading: note the canary's answer. Without one it never sleeps."""
        record = self._record()
        if not record.sleeps or record.canary_noted:
            return
        noted = await self._sleeper.note(record.bare_mib, record.memory_mib)
        if isinstance(noted, Reload):
            logger.warning("engine cannot sleep engine=%s why=%s", record.engine, noted.reason)
            self._update({"sleep_mib": 0})
        else:
            took = (now - was for now, was in zip(self._sleeper.loaded, record.bare_mib, strict=False))
            canary = {"canary_noted": True, "canary_text": noted.text, "canary_numbers": noted.numbers}
            self._update({**canary, "held_mib": min(took, default=0)})

    async def fall_asleep(self, *, alone: bool = True) -> EngineAsleep | Reload:
        """Put it to sleep; ``alone``: its GPUs are not taken yet."""
        record = self._record()
        most_mib = record.memory_mib * len(record.gpus)
        self._update({"sleep": "sleep", "sleep_mib": record.sleep_mib or most_mib})
        async with self._devices.alone(record.gpus if alone else ()):
            processes_mib = 0 if record.slept else await asyncio.to_thread(self._gauges.held_mib, record.mark)
            left_mib = self._gauges.available_mib()
            result = await self._sleeper.fall_asleep(min(record.memory_mib, record.held_mib or record.memory_mib))
            gone_mib = left_mib - self._gauges.available_mib()
        if isinstance(result, Reload):
            return result
        changed: dict[str, Any] = {"sleep": "asleep", "freed_mib": result.freed_mib}
        changed["kept_mib"] = max(0, record.memory_mib - min(result.freed_mib))
        if not record.slept:
            after_mib = await asyncio.to_thread(self._gauges.held_mib, record.mark)
            changed |= {"slept": True, "sleep_mib": asleep_mib(processes_mib, after_mib, gone_mib, most_mib)}
        self._update(changed)
        record = self._record()
        logger.info("engine asleep engine=%s took_s=%.1f sleep_mib=%d", record.engine, result.took_s, record.sleep_mib)
        return EngineAsleep(record.engine, record.sleep_mib, result.took_s, record.kept_mib)

    async def wake(self, *, alone: bool = True) -> EngineAwake | Reload:
        """Wake it, and compare its answer with the noted one."""
        self._update({"sleep": "wake"})
        record = self._record()
        noted = Canary(record.canary_text, record.canary_numbers)
        async with self._devices.alone(record.gpus if alone else ()):
            result = await self._sleeper.wake(Asleep(record.freed_mib, 0.0), noted)
        if isinstance(result, Reload):
            return result
        self._update({"sleep": ""})
        logger.info("engine awake engine=%s took_s=%.1f", record.engine, result.took_s)
        return EngineAwake(record.engine, result.took_s)

    async def sleep_once(self) -> Reload | None:
        """Before it serves (``StartEngine.sleep_mib``): its host memory is pinned, and it is known to wake."""
        result = await self.fall_asleep(alone=False)
        if isinstance(result, Reload):
            return result
        woken = await self.wake(alone=False)
        return woken if isinstance(woken, Reload) else None
