"""Processes of engines: started in their own group, ended with all of it. The only place that starts engines."""

from __future__ import annotations

import asyncio
import contextlib
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

from gateway_plugin.engine_records import clear_away, strays
from gateway_plugin.files import NO_ROOM
from gateway_plugin.log_retention import KEPT, mark_in_use, prune
from gateway_plugin.paths import Layout
from gateway_plugin.processes import Mark, alive, group_members, mark, mark_of_dead
from serve.agent.records import EngineRecord

logger = logging.getLogger(__name__)

_LOG_TAIL_BYTES = 64 * 1024
_LOG_ROOM_BYTES = 64 * 1024
"""Free disk space needed to start an engine's log."""
_ISOLATED_WITHIN_S = 10.0
"""The call takes milliseconds."""


def free_port(host: str) -> int:
    """A TCP port that is free on ``host`` now. Raises ``OSError`` if the address is not this machine's."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def demand_program(argv: tuple[str, ...], env: Mapping[str, str]) -> None:
    """Raises ``FileNotFoundError`` if the program of ``argv`` does not exist."""
    if shutil.which(argv[0], path=env.get("PATH", os.defpath)) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])


@dataclass(frozen=True)
class Spawned:
    """A process that was just started."""

    child: subprocess.Popen[bytes]
    """The engine, or its isolation wrapper, which ends with it."""
    mark: Mark
    """The engine's own process: leader of its session and group."""


def spawn(
    argv: tuple[str, ...],
    env: Mapping[str, str],
    log: Path,
    wrapper: tuple[str, ...] = (),
    stdin: int = subprocess.DEVNULL,
) -> Spawned:
    """Start a process in its own session and group, its output in ``log`` (0600; an earlier one becomes ``.log.1``).

    ``wrapper``: the command line of ``gateway_plugin.isolation``, of a program that starts ``argv`` as its child.

    Raises:
        OSError: the program or the log's folder is not there.
    """
    with contextlib.suppress(FileNotFoundError):
        log.replace(log.with_name(f"{log.name}.1"))  # keeps an earlier process's output apart from this one's
    demand_program(argv, env)  # else only bubblewrap's child fails
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
            # Many programs end when they cannot write their output.
            logger.warning("engine without log log=%s why=%s", log, error)
            output = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        else:
            mark_in_use(output)
        words = (*wrapper, "--info-fd", str(tell), "--", *argv) if wrapper else argv
        child = subprocess.Popen(
            words,
            env=dict(env),
            stdin=stdin,
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
    """PID of the isolated process, once it leads its session: before that it could not be found as the group's leader.

    The PID of ``child`` if it ends before that. Raises ``OSError`` if neither happens, e.g. on a hanging file system.
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
    """Remove the oldest logs of ended engines of all nodes. ``living``: names of engines known to run."""

    def engine_of(log: Path) -> str:
        return log.name.removesuffix(".1").removesuffix(".log")

    prune(layout.engine_logs.glob("*.log*"), engine_of, living, keep)


async def end_group(leader: Mark, grace_s: float, strays: Callable[[], tuple[Mark, ...]] = tuple) -> None:
    """End the process group that ``leader`` leads or led, and ``strays``: SIGTERM, after ``grace_s`` SIGKILL; returns
    when they are gone.

    Where the leader is dead, the rest is killed at once: it holds the memory and serves no request.
    """
    deadline = time.monotonic() + (grace_s if alive(leader) else 0.0)
    told = False

    def found() -> tuple[Mark, ...]:
        group = group_members(leader)
        return group if group and told else tuple(dict.fromkeys((*group, *strays())))

    while members := await asyncio.to_thread(found):
        kill = time.monotonic() >= deadline or leader.pid not in {member.pid for member in members}
        if kill or not told:
            for member in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, signal.SIGKILL if kill else signal.SIGTERM)
        told = True
        await asyncio.sleep(0.05)


async def end_engine(record: EngineRecord, grace_s: float, child: subprocess.Popen[bytes] | None = None) -> None:
    """End an engine's process group, and what left it; returns when these and its container are gone.

    ``child``: the engine, or its isolation wrapper.
    """
    wrapper = 0 if child is None or child.pid == record.pid else child.pid
    await end_group(record.mark, grace_s, lambda: strays(record.log, record.mark, wrapper))
    if record.remove or record.scratch:
        await asyncio.to_thread(clear_away, record.remove, record.scratch)


def tail(log: Path) -> str:
    """The end of a log, at most 64 KiB; ``""`` if there is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""
