"""Is it still that process? The one answer, for blocks, parts of the service and engines alike.

A PID alone says nothing after a crash or a reboot: it may be somebody else's by now. With the time when the process
started it is one process for good. All of it reads ``/proc``, so that ``gateway status`` needs no package for it.
"""

from __future__ import annotations

import os
from pathlib import Path

_PROC = Path("/proc")

START_TOLERANCE_S = 2.0
"""Start times are counted from the boot time, which the kernel tells in whole seconds and shifts as the clock is
corrected. No PID is given out again that fast."""


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


def started_at(pid: int) -> float | None:
    """When the living process ``pid`` started, in seconds since the epoch as ``psutil`` has it.

    ``None`` if there is none, or only what is left of it until its parent looks (a zombie).
    """
    found = stat_of(pid)
    if found is None or found[0] in "ZX":
        return None
    return _boot_time_s() + found[3] / os.sysconf("SC_CLK_TCK")


def still_runs(pid: int | None, started: float | None) -> bool:
    """Whether the process ``pid`` that began at ``started`` lives and is this user's. A zombie does not live.

    To root all are: what it starts may become another user.
    """
    if pid is None or started is None or pid <= 0:
        return False
    now = started_at(pid)
    return now is not None and abs(now - started) <= START_TOLERANCE_S and os.getuid() in (0, _real_user(pid))


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
