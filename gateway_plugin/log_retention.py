"""Retention of logs: a fixed number of finished ones is kept, and those still written to stay."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

KEPT = 50
"""Logs kept of ended engines, and of ended blocks."""


def surplus(newest: Mapping[str, float], spared: Collection[str], keep: int = KEPT) -> tuple[str, ...]:
    """Which of the names in ``newest`` (name -> time) to remove: all but the ``keep`` latest; none in ``spared``. Pure.

    Oldest first; at equal times in the order of the names.
    """
    over = sorted((when, name) for name, when in newest.items() if name not in spared)
    return tuple(name for _, name in over[: max(0, len(over) - keep)])


def prune(
    files: Iterable[Path], owner_of: Callable[[Path], str], spared: Collection[str], keep: int = KEPT
) -> tuple[str, ...]:
    """Remove the files of surplus owners (see ``surplus``), except of those that hold a lock on one.

    A file that cannot be inspected or removed is left: this is housekeeping, and must not block a start.

    Returns:
        The owners whose files were removed.
    """
    owned: dict[str, list[Path]] = defaultdict(list)
    newest: dict[str, float] = {}
    for path in files:
        with contextlib.suppress(OSError):  # removed meanwhile
            owner = owner_of(path)
            newest[owner] = max(path.stat().st_mtime, newest.get(owner, 0.0))
            owned[owner].append(path)
    over = tuple(owner for owner in surplus(newest, spared, keep) if not any(_in_use(path) for path in owned[owner]))
    for owner in over:
        for path in owned[owner]:
            with contextlib.suppress(OSError):
                path.unlink()
    return over


def mark_in_use(descriptor: int) -> None:
    """Lock an open log while any process holds this descriptor: its writer, and each process that inherits it.

    The lock shows that an engine on another node, whose logs are in the same shared folder, is alive. On a file system
    without locks nothing is marked, and ``prune``, which finds no locks either, removes nothing.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _in_use(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
