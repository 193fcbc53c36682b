"""One controller at a time: the one before has ended before the next one begins.

Serve starts a new controller once it has given up the old one, which may still run and send drains and closes to the
edge. The lock is the kernel's: it needs no disk space, names its holder, and is free once that process has ended.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import struct
import time
from pathlib import Path

log = logging.getLogger("gateway.controller")

_FLOCK = "hhqqi"
"""``struct flock`` of Linux on 64 bits: type, whence, start, length, PID."""
_POLL_S = 0.05


def become_the_only_one(lock: Path, patience_s: float = 5.0) -> int:
    """Hold ``lock`` until this process ends; a process that holds it after ``patience_s`` is killed. Blocks.

    Returns the descriptor, which must stay open. Raises ``OSError``.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= deadline and (holder := _holder(descriptor)) > 0:
                log.warning("controller-replaced", extra={"killed": holder})
                os.kill(holder, signal.SIGKILL)
                deadline = time.monotonic() + patience_s
            time.sleep(_POLL_S)
        else:
            return descriptor


def _holder(descriptor: int) -> int:
    """PID of the process that holds the lock; 0 if none does any more."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    return 0 if kind == fcntl.F_UNLCK else int(pid)
