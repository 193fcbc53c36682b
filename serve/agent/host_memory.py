"""Host memory for engines that sleep: what the node, or its job's cgroup, has left, and what of it they may take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

from gateway_plugin.processes import Mark, group_members

_ENGINE_MIB = 8 * 1024
"""For the processes of an engine that has not slept, kept free for each GPU; measured: 8 to 10 GiB."""
_SPARE_SHARE = 0.1
"""Of what is left: kept free for everything else on the node."""
_TRACE_SHARE = 0.01
"""Of the memory of an engine's GPUs: its weights are more than that."""


def available_mib() -> int:
    """Host memory that processes of this job can still take; 0 if that is not known."""
    left = [psutil.virtual_memory().available // 2**20, *_left_in_cgroups()]
    return max(0, min(left))


def held_mib(leader: Mark) -> int:
    """Host memory that the processes of an engine hold for themselves alone."""
    held = 0
    for member in group_members(leader):
        with contextlib.suppress(psutil.Error):
            held += psutil.Process(member.pid).memory_full_info().uss
    return held // 2**20


def taken_mib(leader: Mark) -> int:
    """Host memory of an engine's processes, what they share counted once (proportional set size)."""
    taken = 0
    for member in group_members(leader):
        with contextlib.suppress(psutil.Error):
            taken += psutil.Process(member.pid).memory_full_info().pss
    return taken // 2**20


def asleep_mib(before_mib: int, after_mib: int, gone_mib: int, most_mib: int) -> int:
    """Host memory that an engine holds from its first sleep on. Pure.

    Args:
        before_mib: what its processes held before it (``held_mib``), ``after_mib``: after it. Pinned memory is counted
            there where it is registered (``argv._PINNING``), else not.
        gone_mib: by how much less the node has left since; others take and give back memory meanwhile.
        most_mib: the memory of its GPUs.

    (1) by its processes or by the node, whichever is more; by the node no more than its GPUs had, by its processes it
    may be: torch rounds each tensor up to a power of two; (2) almost nothing: other processes gave back as much
    meanwhile, and it is not known.
    """
    found_mib = max(after_mib, min(before_mib + gone_mib, most_mib))  # (1)
    if found_mib - before_mib < most_mib * _TRACE_SHARE:  # (2)
        found_mib = max(before_mib, most_mib)
    return max(1, found_mib)


def budget_mib(asked_mib: int | None, left_mib: int, host_mib: int, gpus: int) -> tuple[int, str]:
    """Host memory for sleeping engines' weights, and a warning where it is less than the site asks for. Pure.

    Args:
        asked_mib: the site's ``sleep_memory_gib``; ``None``: measured.
        left_mib: what is left on the node, and what its engines hold for their sleep already.
        host_mib: what engines without GPUs may take.

    (1) The site's, as far as there is so much; (2) measured: what is left, without the memory of other engines, of each
    GPU's engine processes, and a tenth to spare.
    """
    if asked_mib is not None:  # (1)
        if asked_mib <= left_mib:
            return asked_mib, ""
        return max(0, left_mib), f"the site says {asked_mib} MiB for sleeping engines, the node has {left_mib} MiB left"
    return max(0, int(left_mib * (1 - _SPARE_SHARE)) - host_mib - gpus * _ENGINE_MIB), ""  # (2)


def _left_in_cgroups(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """MiB below the memory limit of each cgroup (version 2 or 1) around this process; page cache counts as free."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inside = base / path.lstrip("/")
        for folder in (inside, *inside.parents):
            if base not in (folder, *folder.parents):
                break
            try:
                most, held = int((folder / limit).read_text()), int((folder / used).read_text())
                cache = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such cgroup here, or no limit ("max")
                continue
            files = sum(
                int(cache.get(f"total_{kind}", cache.get(kind, 0))) for kind in ("inactive_file", "active_file")
            )
            yield (most - held + files) // 2**20
