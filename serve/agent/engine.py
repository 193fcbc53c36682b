"""One engine process: started, watched, ended with everything it started. The only place that starts engines."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from gateway_plugin.identity import Mark, age_s, alive, mark, mark_of_dead
from gateway_plugin.layout import Layout
from gateway_plugin.masking import masked
from gateway_plugin.pruning import KEPT, mark_in_use, prune
from gateway_plugin.state_file import NO_ROOM
from serve.agent import records
from serve.agent.lastwords import last_words, summary_of
from serve.agent.probe import Health, Probe, ProbeFailed
from serve.agent.records import EngineRecord
from serve.core.events import EngineExited, EngineListening, EngineReady, FoundEngine

logger = logging.getLogger(__name__)

_LOG_TAIL_BYTES = 64 * 1024
_LOG_ROOM_BYTES = 64 * 1024
"""An engine's log is begun only where there is room for so much."""
_ISOLATED_WITHIN_S = 10.0
"""It takes milliseconds."""


@dataclass(frozen=True)
class Timing:
    """How patient an agent is, in seconds."""

    poll_s: float = 0.2
    """Between looks at a process, and at first between probes of an engine that loads."""
    probe_max_s: float = 1.0
    """Probes of an engine that loads back off to this."""
    health_every_s: float = 5.0
    health_timeout_s: float = 10.0
    hang_after_s: float = 60.0
    """An engine whose health failed for so long hangs. Long: a busy engine is not a dead one."""
    first_answer_s: float = 120.0
    """For the one real request."""
    grace_s: float = 10.0
    """From SIGTERM to SIGKILL."""


def free_port(host: str) -> int:
    """A TCP port that is free on ``host`` now. Raises ``OSError`` if the address is not this machine's."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Spawned:
    """A process that was just started."""

    child: subprocess.Popen[bytes]
    """The engine, or what isolates it and ends with it."""
    mark: Mark
    """The engine's own process: leader of its session and group."""


def spawn(argv: tuple[str, ...], env: Mapping[str, str], log: Path, wrapper: tuple[str, ...] = ()) -> Spawned:
    """Start a process in a session and group of its own, its output in ``log`` (0600; a former one becomes ``.log.1``).

    ``wrapper``: the words of ``gateway_plugin.isolation``, of a program that starts ``argv`` as its child.

    Raises:
        OSError: the program or the log's folder is not there.
    """
    with contextlib.suppress(FileNotFoundError):
        log.replace(log.with_name(f"{log.name}.1"))  # nobody takes a former process's last words for this one's
    if shutil.which(argv[0], path=env.get("PATH", os.defpath)) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])  # bubblewrap's child alone would know
    told, tell = os.pipe()
    output = -1
    try:
        try:
            with tempfile.TemporaryFile(dir=log.parent, buffering=0) as probe:
                probe.write(b"\0" * _LOG_ROOM_BYTES)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            # Many a program ends where it cannot print.
            logger.warning("engine without log log=%s why=%s", log, error)
            output = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        else:
            mark_in_use(output)
        words = (*wrapper, "--info-fd", str(tell), "--", *argv) if wrapper else argv
        child = subprocess.Popen(
            words,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=(tell,) if wrapper else (),
        )
        os.close(tell)
        tell = -1
        pid = _led_by(child, told) if wrapper else child.pid
    finally:
        for descriptor in (told, tell, output):
            if descriptor >= 0:
                os.close(descriptor)
    return Spawned(child, mark(pid, dead_too=True) or mark_of_dead(pid))


def _led_by(child: subprocess.Popen[bytes], told: int) -> int:
    """PID of the isolated process, once it leads its session: so long nobody would find it as the group's leader.

    The PID of ``child`` if it ends before that. Raises ``OSError`` if it does neither: a file system hangs, say.
    """
    deadline = time.monotonic() + _ISOLATED_WITHIN_S
    said = b""
    while select.select((told,), (), (), max(0.0, deadline - time.monotonic()))[0]:
        if not (more := os.read(told, 4096)):
            break
        said += more
    pid = int(json.loads(said)["child-pid"]) if said else child.pid
    while time.monotonic() < deadline:
        if child.poll() is not None:
            return child.pid
        with contextlib.suppress(ProcessLookupError):
            if pid != child.pid and os.getsid(pid) == pid:
                return pid
        time.sleep(0.001)
    for stuck in {pid, child.pid}:
        os.kill(stuck, signal.SIGKILL)
    child.wait()
    raise TimeoutError(f"it was not isolated within {_ISOLATED_WITHIN_S:.0f} s")


def prune_engine_logs(layout: Layout, living: Collection[str], keep: int = KEPT) -> None:
    """Remove the oldest logs of engines that are over, on whatever node they were. ``living``: names known to live."""

    def engine_of(log: Path) -> str:
        return log.name.removesuffix(".1").removesuffix(".log")

    prune(layout.engine_logs.glob("*.log*"), engine_of, living, keep)


async def end_group(leader: Mark, grace_s: float) -> None:
    """End the process group that ``leader`` leads or led: SIGTERM, after ``grace_s`` SIGKILL; returns when it is gone.

    Where the leader is dead, what is left is killed at once: it holds the memory and serves nobody.
    """
    deadline = time.monotonic() + (grace_s if alive(leader) else 0.0)
    told = False
    while members := await asyncio.to_thread(records.group_members, leader):
        kill = time.monotonic() >= deadline or leader.pid not in members
        if kill or not told:
            for member in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL if kill else signal.SIGTERM)
        told = True
        await asyncio.sleep(0.05)


@dataclass(frozen=True)
class Why:
    """Why an engine ended, or must be ended."""

    reason: str
    """For administrators: with what the engine said."""
    summary: str
    """For everybody."""


class EngineProcess:
    """Watches one engine, its own child or one adopted from an earlier agent, until it is gone."""

    def __init__(
        self,
        layout: Layout,
        record: EngineRecord,
        probe: Probe,
        report: Callable[[EngineListening | EngineReady | EngineExited], None],
        child: subprocess.Popen[bytes] | None,
        timing: Timing,
        recorded: bool = True,
    ) -> None:
        self.record = record
        self.settled = asyncio.Event()
        """Set when it was asked its real request, or is gone."""
        self._layout = layout
        self._probe = probe
        self._report = report
        self._child = child
        self._timing = timing
        self._recorded = recorded
        """Its record is on disk as it is here."""
        self._listening = False
        self._ready = False
        self._health = Health(False, "not asked yet")
        self._stop = asyncio.Event()
        self._stop_reason = ""

    def found(self) -> FoundEngine:
        """What the controller is told of it."""
        return FoundEngine(
            id=self.record.engine,
            model=self.record.model,
            gpus=self.record.gpus,
            memory_mib=self.record.memory_mib,
            generation=self.record.generation,
            started=time.time() - age_s(self.record.mark),
            address=self.record.address if self._listening else "",
            ready=self._ready and not self._stop.is_set(),
            loaded_s=self.record.loaded_s,
        )

    def stop(self, reason: str) -> None:
        """Ask for its end; ``run`` does it and reports."""
        self._stop_reason = self._stop_reason or reason
        self._stop.set()

    async def run(self) -> None:
        """Watch until it is gone, with all of its group; then forget its record and report ``EngineExited``."""
        attending = asyncio.create_task(self._attend())
        try:
            why = await self._until_over(attending)
        finally:
            attending.cancel()
            await asyncio.gather(attending, return_exceptions=True)
            await self._probe.close()
        expected = self._stop.is_set()
        await end_group(self.record.mark, self._timing.grace_s)
        deadline = time.monotonic() + self._timing.grace_s
        while self._child is not None and self._child.poll() is None:
            if time.monotonic() > deadline:
                self._child.kill()  # what isolated it was stopped
            await asyncio.sleep(0.01)  # its last thread; and no zombie stays
        await asyncio.to_thread(records.remove, self._layout, self.record.engine)
        words = last_words(tail(Path(self.record.log)), self._secrets)
        why = self._told(words) if expected else _with_words(why or self._how_it_ended(), words)
        logger.info("engine gone engine=%s pid=%d expected=%s", self.record.engine, self.record.pid, expected)
        self.settled.set()
        self._report(self._exited(why, expected))

    @property
    def _secrets(self) -> tuple[str, ...]:
        return (self.record.key, *self.record.secrets)

    def _exited(self, why: Why, expected: bool) -> EngineExited:
        reason = masked(why.reason, self._secrets)
        return EngineExited(self.record.engine, self.record.generation, reason, expected, why.summary)

    async def _until_over(self, attending: asyncio.Task[Why]) -> Why | None:
        """Wait until it was told to stop, or died (``None``), or must be ended (why)."""
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
        """See it through loading, then look after its health. Returns why it must be ended."""
        while not await self._probe.listening():  # noqa: ASYNC110
            await asyncio.sleep(self._timing.poll_s)
        self._listening = True
        self._report(EngineListening(self.record.engine, self.record.generation, self.record.address))
        pause_s = self._timing.poll_s
        while True:
            if (await self._look()).ok:
                failure = await self._ask()
                if not failure:
                    break
                if not self.record.ready:
                    return Why(failure, "it did not answer its first request")
                self._health = Health(
                    False, failure
                )  # adopted: it may just be very busy; the controller has a deadline
            await asyncio.sleep(pause_s)
            pause_s = min(self._timing.probe_max_s, pause_s * 1.5)
        self._now_ready(await self._probe.max_model_len())
        return await self._until_hung()

    async def _ask(self) -> str:
        """Its one real request. ``""``: answered; else why not."""
        try:
            task = cast(Literal["generate", "embed"], self.record.task)
            await self._probe.ask(self.record.model, task, self._timing.first_answer_s)
        except ProbeFailed as failure:
            return failure.message
        return ""

    def _now_ready(self, max_model_len: int | None) -> None:
        loaded_s = self.record.loaded_s
        if loaded_s is None:
            loaded_s = age_s(self.record.mark)
        self.record = dataclasses.replace(self.record, ready=True, loaded_s=loaded_s)
        self._keep_record()
        self._ready = True
        logger.info("engine ready engine=%s pid=%d load_s=%.1f", self.record.engine, self.record.pid, loaded_s)
        record = self.record
        self._report(EngineReady(record.engine, record.generation, record.address, loaded_s, max_model_len))
        self.settled.set()

    def _keep_record(self) -> None:
        """Write its record. Where the disk is full it serves all the same, and this is tried again."""
        try:
            records.write(self._layout, self.record)
        except OSError as error:
            if self._recorded:
                logger.warning("engine not recorded engine=%s why=%s", self.record.engine, error)
            self._recorded = False
        else:
            self._recorded = True

    async def _until_hung(self) -> Why:
        well_at = time.monotonic()
        while True:
            await asyncio.sleep(self._timing.health_every_s)
            if (await self._look()).ok:
                well_at = time.monotonic()
            elif time.monotonic() - well_at >= self._timing.hang_after_s:
                hung = f"hung: no good health for {time.monotonic() - well_at:.0f} s"
                return Why(f"{hung} ({self._health.why})", hung)

    async def _look(self) -> Health:
        self._health = await self._probe.health(self._timing.health_timeout_s)
        return self._health

    def _told(self, words: str) -> Why:
        """Why it was stopped, and how far it had come if it never was ready."""
        if self._ready:
            return Why(self._stop_reason, self._stop_reason)
        stage = self._health.why if self._listening else "never listened"
        how = f"{self._stop_reason}; it was not ready"
        return _with_words(Why(f"{how} ({stage})", how), words)

    def _how_it_ended(self) -> Why:
        code = self._child.returncode if self._child is not None else None
        if code is not None and code > 128 and self._child is not None and self._child.pid != self.record.pid:
            code = 128 - code  # what isolated it says so, as shells do
        how = "it ended"
        if code is not None and code >= 0:
            how = f"it ended with exit code {code}"
        elif code is not None:
            name = signal.Signals(-code).name
            how = f"it was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        return Why(how, how)


def _with_words(why: Why, words: str) -> Why:
    return Why(f"{why.reason}: {words}" if words else why.reason, summary_of(why.summary, words))


def tail(log: Path) -> str:
    """The end of a log, at most 64 KiB; ``""`` if there is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""
