"""Processes of this machine: whether one is still the same, which are the gateway's, and how to end them.

A PID alone identifies nothing after a crash or a reboot. Together with the clock ticks between the boot and the start
of the process, and the id of that boot, it identifies one process permanently, independent of the wall clock: a
``Mark``. ``psutil`` supplies the rest, except starts, children and parents: it orders processes by the wall clock, from
a boot time that the kernel shifts, and so loses a child that started right after its parent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

_PROC = Path("/proc")

BLOCK_MARK = "RAY_CLOUD_INSTANCE_ID"
"""The environment variable that carries a block's name into every process of the block."""
START_TOLERANCE_S = 2.0
"""For records of earlier versions, which have a start by the wall clock alone: the kernel reports the boot time in
whole seconds and shifts it as the clock is corrected. No PID is reused that fast."""
_POLL_S = 0.02


@dataclass(frozen=True, order=True)
class Mark:
    """Identifies one process permanently."""

    pid: int
    started: float = field(compare=False)
    """Start in seconds since the epoch, by the wall clock when it was read. For people, and for records of earlier
    versions; ``ticks`` and ``boot`` identify the process."""
    ticks: int = 0
    """Start in clock ticks since the boot."""
    boot: str = ""
    """The kernel's id of that boot; empty in records of earlier versions."""


def read_mark(document: object) -> Mark | None:
    """The mark in ``{"pid", "started"}``, with ``ticks`` and ``boot`` where present; ``None`` if it is not one."""
    if not isinstance(document, dict):
        return None
    pid, started = document.get("pid"), document.get("started")
    if not isinstance(pid, int) or not isinstance(started, int | float) or pid <= 0:
        return None
    ticks, boot = document.get("ticks"), document.get("boot")
    if not isinstance(ticks, int) or not isinstance(boot, str):
        return Mark(pid, float(started))
    return Mark(pid, float(started), ticks, boot)


class Stat(NamedTuple):
    """Fields of ``/proc/PID/stat``."""

    state: str
    parent: int
    threads: int
    ticks: int
    """Start in clock ticks since the boot."""
    name: str
    """Of its program, at most 15 characters."""

    @property
    def ended(self) -> bool:
        """Whether it is a zombie. One whose first thread has ended while others still run, and hold memory, is not."""
        return self.state in "ZX" and self.threads <= 1


def parse_stat(text: str) -> Stat:
    """Parse a line of ``/proc/PID/stat``. Raises ``ValueError`` or ``IndexError``."""
    head, _, rest = text.rpartition(")")  # the program's name may hold blanks and brackets
    fields = rest.split()
    return Stat(fields[0], int(fields[1]), int(fields[17]), int(fields[19]), head.partition("(")[2])


def _stat_of(pid: int) -> Stat | None:
    try:
        return parse_stat((_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, IndexError):
        return None


def boot_id() -> str:
    """The kernel's id of this boot; empty where the kernel has none."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def mark(pid: int, *, dead_too: bool = False) -> Mark | None:
    """The mark of the living process ``pid``; ``None`` if there is none. ``dead_too`` takes a zombie as well."""
    found = _stat_of(pid)
    if found is None or (found.ended and not dead_too):
        return None
    return Mark(pid, _wall_clock(found.ticks), found.ticks, boot_id())


def mark_of_dead(pid: int) -> Mark:
    """The mark of a process of this boot that has ended: it matches no later process with that PID."""
    return Mark(pid, time.time(), 0, boot_id())


def has_its_pid(known: Mark) -> bool | None:
    """Whether the process that has the PID now, a zombie too, is ``known``; ``None``: no process has it."""
    found = _stat_of(known.pid)
    if found is None:
        return None
    boot = boot_id()
    if known.boot and boot:
        return (known.ticks, known.boot) == (found.ticks, boot)
    return abs(_wall_clock(found.ticks) - known.started) <= START_TOLERANCE_S


def alive(known: Mark | None) -> bool:
    """Whether that very process runs and is this user's. To root every process is its own: a process that root starts
    may become another user's."""
    if known is None or known.pid <= 0 or not has_its_pid(known):
        return False
    found = _stat_of(known.pid)
    return found is not None and not found.ended and (os.getuid() == 0 or _user(known.pid) == os.getuid())


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


def _user(pid: int) -> int | None:
    try:
        return int(psutil.Process(pid).uids().real)
    except psutil.Error:
        return None


# --- looking for processes ---


def own_pids(*, root_sees_all: bool = False) -> tuple[int, ...]:
    """PIDs of this user's processes, without this one and its ancestors. ``root_sees_all``: to root, all processes."""
    spared = {os.getpid()}
    above: int | None = os.getpid()
    while above and (above := parent_pid(above)):
        spared.add(above)
    every = root_sees_all and os.getuid() == 0
    return tuple(pid for pid in psutil.pids() if pid not in spared and (every or _is_own(pid)))


def _is_own(pid: int) -> bool:
    try:
        seen = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return False
    # A process that the kernel protects looks like root's.
    return seen == os.getuid() or (seen == 0 and _user(pid) == os.getuid())


def arguments(pid: int) -> tuple[str, ...]:
    """The command line of ``pid``; empty if it is gone or another user's."""
    try:
        return tuple(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ()


def environment(pid: int) -> dict[str, str]:
    """The environment that ``pid`` was started with; empty if it is gone, another user's, or has overwritten it."""
    try:
        return dict(psutil.Process(pid).environ())
    except (psutil.Error, OSError):
        return {}


def find_own(words: tuple[str, ...]) -> tuple[Mark, ...]:
    """This user's living processes that have these consecutive arguments, each a whole argument."""

    def has_words(pid: int) -> bool:
        line = arguments(pid)
        return any(line[at : at + len(words)] == words for at in range(len(line) - len(words) + 1))

    return _living(pid for pid in own_pids() if has_words(pid))


def descendants(pid: int) -> tuple[Mark, ...]:
    """Living children of ``pid``, their children and so on, also those that became another user's."""
    children: dict[int | None, list[int]] = {}
    for other in psutil.pids():
        children.setdefault(parent_pid(other), []).append(other)
    found = [pid]
    for known in found:  # grows during the loop
        found += children.get(known, ())
    return _living(found[1:])


def listed_children(pid: int) -> tuple[Mark, ...]:
    """Living children of ``pid`` by the kernel's own lists: no look at each process of the machine, as ``descendants``
    takes. Some may be missing while others end, and all are where a kernel has no such lists."""
    found: list[str] = []
    with contextlib.suppress(OSError):
        for thread in (_PROC / str(pid) / "task").iterdir():
            found += (thread / "children").read_text(encoding="ascii").split()
    return _living(map(int, found))


def child(pid: int, name: str) -> Mark | None:
    """A living child of ``pid`` whose program is called ``name``, if there is one."""
    found = ((other, _stat_of(other)) for other in psutil.pids())
    named = (other for other, stat in found if stat is not None and (stat.parent, stat.name) == (pid, name))
    return next(iter(_living(named)), None)


def parent_pid(pid: int) -> int | None:
    """The PID of the parent of ``pid``; ``None`` if ``pid`` is gone."""
    found = _stat_of(pid)
    return None if found is None else found.parent


def group_members(leader: Mark) -> tuple[Mark, ...]:
    """Living processes of the session and process group that ``leader`` leads or led, itself included.

    The kernel gives a PID to no other process while a session of that number has members; so if another process has the
    PID, nothing is left of the group. If no process has it, the leader is gone, but others may live.
    """
    if has_its_pid(leader) is False:
        return ()
    return tuple(known for known in _living(pid for pid in psutil.pids() if _in_group(pid, leader.pid)) if alive(known))


def _in_group(pid: int, leader: int) -> bool:
    try:
        return leader in (os.getsid(pid), os.getpgid(pid))
    except OSError:
        return False  # ended meanwhile


def carries_mark(pid: int, block: str) -> bool:
    """Whether ``pid`` was started inside block ``block``. False for a process that overwrote its environment."""
    return environment(pid).get(BLOCK_MARK) == block


def uses_folder(pid: int, folder: Path) -> bool:
    """Whether ``pid`` has ``folder`` or a path in it in its command line, or holds an open file there."""
    inside = f"{folder}/"
    if any(inside in f"{argument}/" for argument in arguments(pid)):
        return True
    with contextlib.suppress(OSError):  # ended meanwhile, or closed to this user: then not the gateway's
        return any(f"{os.readlink(file)}/".startswith(inside) for file in Path(f"/proc/{pid}/fd").iterdir())
    return False


def writes_to(pid: int, log: str | Path) -> bool:
    """Whether the standard output or error of ``pid`` is the file ``log``."""
    with contextlib.suppress(OSError):
        return bool(log) and any(os.path.samefile(f"/proc/{pid}/fd/{number}", log) for number in (1, 2))
    return False


def block_processes(block: str, folder: Path) -> tuple[Mark, ...]:
    """Every process of block ``block`` on this machine; ``folder`` is the block's temporary folder."""
    return _living(pid for pid in own_pids() if carries_mark(pid, block) or uses_folder(pid, folder))


def folder_processes(folder: Path) -> tuple[Mark, ...]:
    """Every process of this user that uses ``folder``."""
    return _living(pid for pid in own_pids() if uses_folder(pid, folder))


def _living(pids: Iterable[int]) -> tuple[Mark, ...]:
    return tuple(known for known in map(mark, pids) if known is not None)


# --- ending them ---


def end(
    which: Iterable[Mark] | Callable[[], Iterable[Mark]], grace_s: float, *, kill_wait_s: float = 10.0
) -> tuple[Mark, ...]:
    """End processes: SIGTERM, SIGKILL after ``grace_s``. 0 s of grace kills at once. Children are not reaped.

    Args:
        which: the processes, or a search, repeated until it finds none: a killed process may have forked before.

    Returns:
        The processes still alive ``kill_wait_s`` after the first SIGKILL: usually none.
    """
    fixed = None if callable(which) else tuple(which)

    def found() -> list[Mark]:
        marks = which() if callable(which) else fixed or ()
        return [known for known in marks if alive(known) and known.pid != os.getpid()]

    left = found()
    if left and grace_s > 0:
        terminate(*left)
        _wait_for_end(left, grace_s)
        left = found()
    deadline = time.monotonic() + kill_wait_s
    while left and time.monotonic() < deadline:
        _signal(left, signal.SIGKILL)
        _wait_for_end(left, 1.0)
        left = found()
    return tuple(left)


def terminate(*marks: Mark) -> None:
    """Send SIGTERM to those that live, and return at once."""
    _signal(marks, signal.SIGTERM)


def _signal(marks: Iterable[Mark], number: signal.Signals) -> None:
    for known in marks:
        if alive(known):
            with contextlib.suppress(ProcessLookupError):
                os.kill(known.pid, number)


def _wait_for_end(marks: Iterable[Mark], wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while any(map(alive, marks)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def end_words(code: int) -> str:
    """How a child ended, for messages; empty after exit code 0."""
    if code == 0:
        return ""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
