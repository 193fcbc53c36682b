"""The service's processes: what belongs to one, and how to end it. Reads only ``/proc``."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from gateway_plugin.processes import Mark, alive, mark, stat_of

_PROC = Path("/proc")


def arguments(pid: int) -> tuple[str, ...]:
    """The command line of ``pid``; empty if it is gone or another user's."""
    try:
        raw = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(part.decode(errors="replace") for part in raw.split(b"\0")[:-1])


def own_processes(*, root_sees_all: bool = False) -> tuple[int, ...]:
    """PIDs of this user's processes, this one left out, ascending. ``root_sees_all``: to root, everybody's."""
    everybody = root_sees_all and os.getuid() == 0
    found: list[int] = []
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if everybody or entry.stat().st_uid == os.getuid():
                found.append(int(entry.name))
        except OSError:
            continue
    return tuple(sorted(found))


def find_own(words: tuple[str, ...]) -> tuple[Mark, ...]:
    """This user's living processes whose arguments hold ``words``, one after the other, each a whole argument."""
    found: list[Mark] = []
    for pid in own_processes():
        line = arguments(pid)
        if any(line[at : at + len(words)] == words for at in range(len(line) - len(words) + 1)):
            known = mark(pid)
            if known is not None:
                found.append(known)
    return tuple(found)


def descendants(pid: int) -> tuple[Mark, ...]:
    """Living children of ``pid``, their children and so on, those that root's became other users' too."""
    children: dict[int, list[int]] = {}
    for other in own_processes(root_sees_all=True):
        stat = stat_of(other)
        if stat is not None:
            children.setdefault(stat[1], []).append(other)
    found: list[Mark] = []
    todo = [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            todo.append(child)
            known = mark(child)
            if known is not None:
                found.append(known)
    return tuple(found)


def end(marks: Iterable[Mark], *, grace_s: float, kill_wait_s: float = 5.0) -> tuple[Mark, ...]:
    """End these processes: SIGTERM, SIGKILL after ``grace_s``. Returns what still lives; 0 s of grace kills at once."""
    left = [known for known in marks if alive(known) and known.pid != os.getpid()]
    if grace_s > 0:
        left = _signal_and_wait(left, signal.SIGTERM, grace_s)
    return tuple(_signal_and_wait(left, signal.SIGKILL, kill_wait_s))


def end_words(code: int) -> str:
    """How a child ended, for people; empty when all was well."""
    if code == 0:
        return ""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _signal_and_wait(marks: list[Mark], number: signal.Signals, wait_s: float) -> list[Mark]:
    for known in marks:
        if alive(known):
            try:
                os.kill(known.pid, number)
            except ProcessLookupError:
                continue
    deadline = time.monotonic() + wait_s
    left = marks
    while True:
        left = [known for known in left if alive(known)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)
