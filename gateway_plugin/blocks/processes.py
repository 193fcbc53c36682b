"""Which processes of this machine are ours: by their start, by a mark they carry, by a folder they use.

A PID alone says nothing after a restart, a name (``raylet``) is everybody's, and Ray's workers overwrite their own
command line. What cannot be mistaken: the start, a block's unique name in the environment it was started with, and
open files or arguments in a folder that belongs to one gateway.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

from gateway_plugin.processes import Mark, alive

BLOCK_MARK = "RAY_CLOUD_INSTANCE_ID"
"""The environment variable that carries a block's name into everything that runs in it."""


def same_process(known: Mark | None) -> psutil.Process | None:
    """The process ``known`` while it lives and is this user's; else ``None``. A zombie is not alive."""
    try:
        return psutil.Process(known.pid) if known is not None and alive(known) else None
    except psutil.NoSuchProcess:
        return None


def own_processes() -> Iterator[psutil.Process]:
    """Every live process of this user, except this one and its ancestors."""
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter():
        try:
            mine = process.pid not in spared and process.uids().real == os.getuid()
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.NoSuchProcess:
            continue


def carries_mark(process: psutil.Process, block: str) -> bool:
    """Whether ``process`` was started inside block ``block``. False for one that overwrote its environment."""
    try:
        return process.environ().get(BLOCK_MARK) == block
    except (psutil.Error, OSError):
        return False


def uses_folder(process: psutil.Process, folder: Path) -> bool:
    """Whether ``process`` names ``folder`` or something in it in its command line, or holds an open file there."""
    inside = f"{folder}/"
    try:
        if any(inside in f"{argument}/" for argument in process.cmdline()):
            return True
        for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
            if f"{os.readlink(descriptor)}/".startswith(inside):
                return True
    except (psutil.Error, OSError):
        return False  # it ended while we looked, or it is closed to us: then it is not ours to judge
    return False


def writes_to(process: psutil.Process, log: str) -> bool:
    """Whether the standard output or error of ``process`` is the file ``log``."""
    try:
        return bool(log) and any(os.path.samefile(f"/proc/{process.pid}/fd/{number}", log) for number in (1, 2))
    except OSError:
        return False  # it ended while we looked, or is closed to us


def block_processes(block: str, folder: Path) -> list[psutil.Process]:
    """Everything that runs in block ``block`` on this machine, whose temporary folder is ``folder``."""
    return [process for process in own_processes() if carries_mark(process, block) or uses_folder(process, folder)]


def folder_processes(folder: Path) -> list[psutil.Process]:
    """Every process of this user that uses ``folder``."""
    return [process for process in own_processes() if uses_folder(process, folder)]


def end(find: Callable[[], Iterable[psutil.Process]], grace_s: float, deadline_s: float = 10.0) -> list[psutil.Process]:
    """End all that ``find`` finds: ask, wait up to ``grace_s``, then kill, and look again until nothing is found.

    ``grace_s`` 0 kills at once. Gives those that were still there after ``deadline_s`` more: normally none.
    """
    if grace_s > 0:
        asked = list(find())
        for process in asked:
            _signal(process.terminate)
        psutil.wait_procs(asked, timeout=grace_s)
    until = time.monotonic() + deadline_s
    while found := list(find()):  # those killed may have forked meanwhile
        if time.monotonic() > until:
            return found
        for process in found:
            _signal(process.kill)
        psutil.wait_procs(found, timeout=1.0)
    return []


def _signal(send: Callable[[], None]) -> None:
    try:
        send()  # psutil compares start times first, so that a PID given to somebody else is not hit
    except psutil.NoSuchProcess:
        return
