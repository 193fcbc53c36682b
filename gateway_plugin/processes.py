"""Is it still that process? The one answer, for blocks, parts of the service, endpoints and engines alike.

A PID alone says nothing after a crash or a reboot: it may be somebody else's by now. With the clock ticks between the
boot and its start, and the id of that boot, it is one process for good, whatever is done to the wall clock. All of it
reads ``/proc``, so that ``gateway status`` needs no package for it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

_PROC = Path("/proc")

START_TOLERANCE_S = 2.0
"""For records of earlier versions, which have a start by the wall clock alone: that is counted from the boot time,
which the kernel tells in whole seconds and shifts as the clock is corrected. No PID is given out again that fast."""


@dataclass(frozen=True, order=True)
class Mark:
    """One process for good."""

    pid: int
    started: float = field(compare=False)
    """When it started, in seconds since the epoch, by the wall clock as it was when somebody looked. It tells people,
    and processes in records of earlier versions; ``ticks`` and ``boot`` are what identifies it."""
    ticks: int = 0
    """When it started, in clock ticks since the boot."""
    boot: str = ""
    """The kernel's id of that boot; empty in records of earlier versions."""

    def document(self) -> dict[str, float | str]:
        """As it stands in records: ``{"pid", "started", "ticks", "boot"}``."""
        return {"pid": self.pid, "started": self.started, "ticks": self.ticks, "boot": self.boot}


def read_mark(document: object) -> Mark | None:
    """The mark in ``{"pid", "started"}``, with ``ticks`` and ``boot`` where they are; ``None`` if it is not one."""
    if not isinstance(document, dict):
        return None
    pid, started = document.get("pid"), document.get("started")
    if not isinstance(pid, int) or not isinstance(started, int | float) or pid <= 0:
        return None
    ticks, boot = document.get("ticks"), document.get("boot")
    if not isinstance(ticks, int) or not isinstance(boot, str):
        return Mark(pid, float(started))
    return Mark(pid, float(started), ticks, boot)


def parse_stat(text: str) -> tuple[str, int, int, int]:
    """State letter, parent's PID, process group and start (clock ticks since boot) of a ``/proc/PID/stat`` line."""
    fields = text.rpartition(")")[2].split()  # the program's name may hold blanks and brackets
    return fields[0], int(fields[1]), int(fields[2]), int(fields[19])


def stat_of(pid: int) -> tuple[str, int, int, int] | None:
    """``parse_stat``'s answer for ``pid``; ``None`` if there is no such process."""
    try:
        return parse_stat((_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, IndexError):
        return None


def boot_id() -> str:
    """The kernel's id of this boot; empty where it is not told."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def mark(pid: int, *, dead_too: bool = False) -> Mark | None:
    """The mark of the living process ``pid``; ``None`` if there is none, or only what is left of it until its parent
    looks (a zombie), which ``dead_too`` takes as well."""
    found = stat_of(pid)
    if found is None or (found[0] in "ZX" and not dead_too):
        return None
    return Mark(pid, _wall_clock(found[3]), found[3], boot_id())


def mark_of_dead(pid: int) -> Mark:
    """The mark of a process of this boot that is gone already: it matches none that has its PID later."""
    return Mark(pid, time.time(), 0, boot_id())


def has_its_pid(known: Mark) -> bool | None:
    """Whether the process that has the PID now, a zombie too, is ``known``; ``None``: no process has it."""
    found = stat_of(known.pid)
    if found is None:
        return None
    boot = boot_id()
    if known.boot and boot:
        return (known.ticks, known.boot) == (found[3], boot)
    return abs(_wall_clock(found[3]) - known.started) <= START_TOLERANCE_S


def alive(known: Mark | None) -> bool:
    """Whether that very process runs and is this user's. A zombie does not run. To root all processes are its own: what
    it starts may become another user."""
    if known is None or known.pid <= 0 or not has_its_pid(known):
        return False
    found = stat_of(known.pid)
    return found is not None and found[0] not in "ZX" and os.getuid() in (0, _real_user(known.pid))


def age_s(known: Mark) -> float:
    """Seconds since it started. Of a process from an earlier boot or version: by the wall clock."""
    if known.boot and known.boot == boot_id():
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - known.ticks / os.sysconf("SC_CLK_TCK"))
    return max(0.0, time.time() - known.started)


def _wall_clock(ticks: int) -> float:
    return _boot_time_s() + ticks / os.sysconf("SC_CLK_TCK")


def _boot_time_s() -> float:
    for line in (_PROC / "stat").read_text().splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    raise OSError("/proc/stat has no btime")


def _real_user(pid: int) -> int | None:
    try:
        status = (_PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None  # it ended while we looked
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("Uid:")), None)
