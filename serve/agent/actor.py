"""The node agent: the one actor of a block's node. Owns the node's engines; decides nothing, reports everything.

A plain class: ``serve.controller.performer`` wraps it with ``ray.remote``, and tests use it as it is. Nothing happens
before the first call, which first settles what an earlier agent of this node left: its engines are adopted, those of
another agent on the same block are ended, records of dead processes removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import ssl
import subprocess
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gateway_plugin.errors import GatewayError
from gateway_plugin.isolation import Isolation, find_isolation
from gateway_plugin.masking import masked, secrets_of
from gateway_plugin.paths import Layout, private_folder
from gateway_plugin.processes import alive
from serve.agent import records
from serve.agent.argv import device_names, visible_devices
from serve.agent.devices import Devices, Lease
from serve.agent.engine import EngineEvent, EngineProcess
from serve.agent.host_memory import budget_mib
from serve.agent.lastwords import last_words, summary_of
from serve.agent.launch import Launched, Place, launch
from serve.agent.node import gpu_total_mib, node_address, notice_in
from serve.agent.probe import Probe, client_context
from serve.agent.processes import end_engine, prune_engine_logs, tail
from serve.agent.records import EngineRecord
from serve.agent.timing import Timing
from serve.agent.warm import Gauges, measure_bare
from serve.core.effects import SleepEngine, StartEngine, StopEngine, WakeEngine
from serve.core.events import EngineExited, NodeJoined, NodeLeaves

AgentEvent = EngineEvent | NodeLeaves
"""Events that an agent reports."""

logger = logging.getLogger(__name__)

_HISTORY = 2000
_ADOPTION_WAIT_S = 5.0
"""How long ``describe`` waits for the first answer of adopted engines, so that it can call them ready."""


@dataclass(frozen=True)
class AgentSettings:
    """Settings of an agent, given when it is created."""

    node: str
    """Its name, chosen by the controller."""
    type: str
    """The site's node type."""
    state: str
    """The gateway's state folder."""
    host_mib: int
    gpu_mib: tuple[int, ...]
    on_loopback: bool
    """Engines listen on 127.0.0.1: the block is on the gateway's own machine."""
    isolate: Literal["auto", "required", "off"] = "auto"
    """``Site.isolate_engines``"""
    fetched: Path | None = None
    """Where weights from the hub lie; ``None``: engines load them."""
    sleep_mib: int | None = 0
    """Host memory for engines that sleep; 0: none does, ``None``: measured."""


class NodeAgent:
    """One node's engines."""

    def __init__(self, settings: AgentSettings, timing: Timing | None = None, gauges: Gauges | None = None) -> None:
        self._settings = settings
        self._gauges = gauges or Gauges()
        self._devices, self._sleep_mib = Devices(), 0
        self._timing = timing or Timing()
        self._layout = Layout.of(Path(settings.state))
        self._block = os.environ.get("RAY_CLOUD_INSTANCE_ID", "")
        self._host = "127.0.0.1" if settings.on_loopback else ""
        self._gpu_total_mib = 0
        self._isolation = Isolation(reason="the site says 'off'")
        self._context: ssl.SSLContext | None = None
        self._epoch = 0
        self._engines: dict[str, EngineProcess] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._known: dict[str, None] = {}
        """Engines that were started or stopped, the latest last: a start that arrives after its stop is ignored."""
        self._begun: asyncio.Task[None] | None = None
        self._notice: asyncio.Task[None] | None = None
        self._stopped: dict[str, None] = {}
        """Of those, the ones stopped while they were not there: a start that waits for its GPUs does not happen."""
        self._events: deque[tuple[int, AgentEvent]] = deque(maxlen=_HISTORY)
        self._last = 0
        self._fetched = 0
        """Events up to this number were acknowledged: a controller has processed them."""
        self._leaves: NodeLeaves | None = None
        self._news = asyncio.Event()
        """Set at the next event, then replaced."""

    async def describe(self) -> tuple[NodeJoined, int]:
        """The node and every engine process on it. Adopted engines are ready only after they answered again.

        Returns:
            The description, and the number to ask ``events`` with: events that an earlier controller received are not
            repeated, except a notice, which every controller receives.
        """
        await self._begin()
        unsure = [asyncio.create_task(e.settled.wait()) for e in self._engines.values() if e.record.ready]
        if unsure:
            _, late = await asyncio.wait(unsure, timeout=_ADOPTION_WAIT_S)
            for waiting in late:
                waiting.cancel()
        fetched = self._fetched
        if self._leaves is not None:
            self._report(self._leaves)
        joined = NodeJoined(
            node=self._settings.node,
            type=self._settings.type,
            block=self._block,
            address=self._host,
            host_mib=self._settings.host_mib,
            gpu_mib=self._gpu_mib(),
            engines=tuple(engine.found() for engine in self._engines.values()),
            sleep_mib=self._sleep_mib,
        )
        return joined, fetched

    async def start(self, command: StartEngine, key: str) -> None:
        """Start an engine; returns once its process runs, which waits while others load or stop on its GPUs. Nothing
        happens for one that was started or stopped before (an id is never used twice), nor for an older epoch.

        Outcome: ``EngineListening`` and ``EngineReady``, or ``EngineExited`` (also if it could not even be started).
        """
        await self._begin()
        if not self._accepts(command.epoch) or command.engine in self._known:
            return
        self._note(command.engine)
        lease = await self._devices.take(command.gpus)
        bare_mib = await measure_bare(command, self._gauges) if self._sleep_mib > 0 else ()
        if command.engine in self._stopped or not self._accepts(command.epoch):  # meanwhile
            lease.release()
            return
        try:
            started = self._launch(command, key, bare_mib)
            self._watch(started.record, started.child, lease, started.recorded)
        except (GatewayError, OSError) as error:
            lease.release()
            reason = error.message if isinstance(error, GatewayError) else f"could not be started: {error}"
            reason = masked(reason, secrets_of(command.model.variables))
            summary = "it could not be started"
            self._report(EngineExited(command.engine, reason, expected=False, summary=summary))

    async def stop(self, command: StopEngine) -> None:
        """End an engine with all of its process group; returns at once.

        Outcome: ``EngineExited``, also if there is no such engine.
        """
        await self._begin()
        if not self._accepts(command.epoch):
            return
        self._note(command.engine)
        if (engine := self._engines.get(command.engine)) is not None:
            engine.stop(command.reason)
            return
        self._stopped[command.engine] = None
        self._report(EngineExited(command.engine, f"{command.reason}; it was not there", expected=True))

    async def sleep(self, command: SleepEngine) -> None:
        """Put an engine to sleep; returns at once. Outcome: ``EngineAsleep``, or ``EngineExited``."""
        if (engine := await self._asked(command)) is not None:
            engine.sleep()

    async def wake(self, command: WakeEngine) -> None:
        """Wake an engine; returns at once. Outcome: ``EngineAwake``, or ``EngineExited``."""
        if (engine := await self._asked(command)) is not None:
            engine.wake()

    async def _asked(self, command: SleepEngine | WakeEngine) -> EngineProcess | None:
        """The engine of a command of this epoch."""
        await self._begin()
        if not self._accepts(command.epoch):
            return None
        engine = self._engines.get(command.engine)
        if engine is None:
            self._report(EngineExited(command.engine, "it was not there", expected=True))
        return engine

    async def still(self, in_flight: Mapping[str, int]) -> None:
        """Stillness of engines on this node, from the edge: requests in flight on each engine that has sent nothing for
        a while (valid for some seconds); or 0: it has sent something again after such a while."""
        for name, count in in_flight.items():
            if (engine := self._engines.get(name)) is not None:
                engine.told(count)

    async def events(self, after: int, wait_s: float) -> tuple[int, tuple[AgentEvent, ...]]:
        """Events numbered above ``after``, oldest first, as soon as there are any, or after ``wait_s`` seconds.

        Returns:
            The number to ask with next time, and the events. Numbers begin at 1 with each agent: an ``after`` from an
            earlier agent returns all events of this one.
        """
        await self._begin()
        if after > self._last:
            after = 0
        self._fetched = max(self._fetched, after)
        if self._last <= after:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), wait_s)
        return max(after, self._last), tuple(event for number, event in self._events if number > after)

    async def shutdown(self, end_engines: bool = True) -> None:
        """End every engine, or with ``end_engines=False`` leave them to the next agent."""
        await self._begin()
        if self._notice is not None:
            self._notice.cancel()
        watchers = tuple(self._watchers.values())
        for engine in self._engines.values():
            if end_engines:
                engine.stop("the node agent shuts down")
        if not end_engines:
            for watcher in watchers:
                watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)

    def _gpu_mib(self) -> tuple[int, ...]:
        """Memory of each visible GPU: fewer than the site configures where the batch system allocated fewer."""
        expected, given = self._settings.gpu_mib, visible_devices(os.environ)
        if given and len(given) < len(expected):
            logger.warning("gpus missing node=%s given=%d expected=%d", self._settings.node, len(given), len(expected))
            return expected[: len(given)]
        return expected

    def _accepts(self, epoch: int) -> bool:
        self._epoch = max(self._epoch, epoch)
        return epoch == self._epoch

    def _note(self, engine: str) -> None:
        """Remember the engine's id; forget the oldest beyond ``_HISTORY``."""
        self._known.pop(engine, None)
        self._known[engine] = None
        if len(self._known) > _HISTORY:
            forgotten = next(iter(self._known))
            del self._known[forgotten]
            self._stopped.pop(forgotten, None)

    def _launch(self, command: StartEngine, key: str, bare_mib: tuple[int, ...]) -> Launched:
        prune_engine_logs(self._layout, [records.file_name(engine) for engine in (command.engine, *self._engines)])
        given = self._settings
        place = Place(given.node, self._block, self._host, self._gpu_total_mib, given.fetched, bare_mib)
        return launch(self._layout, place, command, key, self._isolation, given.isolate)

    def _watch(
        self,
        record: EngineRecord,
        child: subprocess.Popen[bytes] | None,
        lease: Lease | None = None,
        recorded: bool = True,
    ) -> None:
        self._context = self._context or client_context(self._layout)
        probe = Probe(record.address, self._context, record.key)
        names = device_names(record.gpus, visible_devices(os.environ))
        engine = EngineProcess(
            self._layout, record, probe, self._report, child, self._timing, self._devices, lease, names, self._gauges,
            recorded,
        )  # fmt: skip
        self._engines[record.engine] = engine
        watcher = self._watchers[record.engine] = asyncio.create_task(engine.run())
        watcher.add_done_callback(lambda ended: self._watched(record, ended))

    def _watched(self, record: EngineRecord, ended: asyncio.Task[None]) -> None:
        if self._watchers.get(record.engine) is ended:
            del self._watchers[record.engine]
        if not ended.cancelled() and (failure := ended.exception()) is not None:
            logger.error("engine watch failed engine=%s", record.engine, exc_info=failure)
            how = "its agent failed to see it off"
            self._report(EngineExited(record.engine, f"{how}: {failure!r}", False, how))

    async def _watch_notice(self, folder: Path) -> None:
        try:
            notice = await notice_in(folder, self._settings.node)
        except (OSError, ValueError) as error:
            logger.error("notice unread node=%s said=%s", self._settings.node, error)  # noqa: TRY400 - the message is complete
            return
        logger.warning("node leaves node=%s until=%.0f reason=%s", notice.node, notice.until, notice.reason)
        self._leaves = notice
        self._report(notice)

    def _report(self, event: AgentEvent) -> None:
        self._last += 1
        self._events.append((self._last, event))
        if isinstance(event, EngineExited):
            self._engines.pop(event.engine, None)  # its memory is free: the controller must not find it here
        self._news.set()
        self._news = asyncio.Event()

    async def _begin(self) -> None:
        if self._begun is None or (self._begun.done() and self._begun.exception() is not None):
            self._begun = asyncio.create_task(self._settle())
        await asyncio.shield(self._begun)

    async def _settle(self) -> None:
        """Adopt this node's engines, end those of another agent on this block, remove records of dead processes."""
        self._context = client_context(self._layout)
        self._host = self._host or node_address(self._layout)
        self._gpu_total_mib = await asyncio.to_thread(gpu_total_mib) if self._settings.gpu_mib else 0
        private_folder(self._layout.run)
        private_folder(self._layout.engine_records)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold keys and, of an engine, prompts
        if self._settings.isolate != "off":
            self._isolation = await asyncio.to_thread(find_isolation, self._layout)
            if not self._isolation.program:
                logger.warning("engines not isolated node=%s why=%s", self._settings.node, self._isolation.reason)
        await asyncio.to_thread(records.end_unrecorded, self._layout, self._block)
        for record in tuple(records.read_all(self._layout)):
            if record.block != self._block:
                continue  # another block's, on the same machine
            runs = alive(record.mark)
            if runs and record.node == self._settings.node:
                self._epoch = max(self._epoch, record.epoch)
                self._note(record.engine)
                logger.info("engine adopted engine=%s pid=%d", record.engine, record.pid)
                self._watch(records.completed(self._layout, record), None)
                continue
            await end_engine(record, self._timing.grace_s)
            records.remove(self._layout, record.engine)
            if record.node == self._settings.node:
                words = last_words(tail(Path(record.log)), (record.key, *record.secrets))
                how = "it ended while its node had no agent"
                self._report(EngineExited(record.engine, f"{how}: {words}", False, summary_of(how, words)))
        self._measure_host()
        if folder := os.environ.get("GATEWAY_BLOCK_FOLDER"):
            self._notice = asyncio.create_task(self._watch_notice(Path(folder)))

    def _measure_host(self) -> None:
        """Host memory for engines that sleep; what adopted engines hold is not free, and theirs."""
        if not (settings := self._settings).gpu_mib or settings.sleep_mib == 0:
            return
        adopted = [engine.record for engine in self._engines.values()]
        held_mib = sum(one.sleep_mib if one.slept else self._gauges.held_mib(one.mark) for one in adopted)
        left_mib = self._gauges.available_mib() + held_mib
        self._sleep_mib, warning = budget_mib(settings.sleep_mib, left_mib, settings.host_mib, len(settings.gpu_mib))
        level = logging.WARNING if warning else logging.INFO
        logger.log(level, "sleep memory node=%s mib=%d %s", settings.node, self._sleep_mib, warning)
