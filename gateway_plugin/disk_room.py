"""How much a user may still write to a folder: what is free on its disk, and what a quota leaves of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_WAIT_S = 10.0


def room_bytes(folder: Path) -> tuple[int, str]:
    """Bytes that can be written to ``folder`` (or the nearest one above that exists), and what limits them: ``disk`` or
    ``quota``.

    Project quotas of XFS, ZFS and most NFS servers show as free space; quotas of users and groups are asked of
    ``quota``, on Lustre of ``lfs quota``. Where neither is there, or it does not answer, only the disk counts.
    """
    place = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(place).free
    left = quota_left(_asked("quota", "-w", "-p", "-f", _mount(place)))
    if left is None:
        left = quota_left(_asked("lfs", "quota", "-q", "-u", str(os.getuid()), str(place)))
    return (left, "quota") if left is not None and left < free else (free, "disk")


def quota_left(said: str) -> int | None:
    """The least that any line leaves, in bytes: ``FILESYSTEM KIB QUOTA LIMIT ...``, as both programs print it. Pure.

    ``None``: no line has a limit. Of the two limits the hard one counts: above the soft one writing goes on for days. A
    ``*`` after the number says that it is exceeded.
    """
    found = []
    for words in (line.split() for line in said.splitlines()):
        numbers = [word.rstrip("*") for word in words[1:4]]
        if len(numbers) == 3 and all(number.isdecimal() for number in numbers):
            used, soft, hard = (int(number) for number in numbers)
            if limit := hard or soft:
                found.append(max(0, limit - used) * 1024)
    return min(found) if found else None


def _asked(*argv: str) -> str:
    if shutil.which(argv[0]) is None:
        return ""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_WAIT_S, check=False,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return done.stdout  # quota ends with 1 where a limit is exceeded


def _mount(place: Path) -> str:
    here = place.resolve()
    return str(next(folder for folder in (here, *here.parents) if folder.is_mount()))
