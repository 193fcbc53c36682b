"""Ctrl-C, SIGTERM and SIGHUP end a test run only after what its tests started is ended.

A gateway, a Slurm or a broker takes up to a minute to end, and xdist gives its workers ten seconds.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN_S = 10.0
"""A signal this soon after another one is the same request: a terminal sends it to every process of the run, people
press twice, and the process that has the workers passes it on."""
ENDING_S = 180.0
"""How long workers may take to end what their tests share, when they are interrupted."""


class Interruption:
    """The signal handler of a process that runs tests, or has the workers that do.

    (1) While tests are being ended, a signal changes nothing: what cleans up is not cut off. (2) Nor does one that
    repeats the one before. (3) Otherwise it raises ``KeyboardInterrupt`` in what runs: the first in the test, a later
    one in what holds up the test's end, such as threads that wait for answers.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.ending = False
        """pytest has begun to end what tests share."""
        self._clock = clock
        self._last_at = float("-inf")

    def install(self) -> None:
        """For every signal, but for one that is ignored: ``nohup``."""
        for number in SIGNALS:
            if number is signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self)

    def __call__(self, _number: int, _frame: object) -> None:
        if self.ending or self._clock() - self._last_at < AGAIN_S:  # (1), (2)
            return
        self._last_at = self._clock()
        raise KeyboardInterrupt  # (3)


def end_workers(session: Any, say: Callable[[str], None], within_s: float = ENDING_S) -> None:
    """Interrupt xdist's workers and wait until each has ended its session; ``session``: xdist's own, of the process
    that has the workers. None is left of a run that was not interrupted."""
    active = set(session._active_nodes)
    if not active:
        return
    say(f"interrupted: the {len(active)} workers end what their tests started, within {within_s:.0f} s")
    for worker in active:
        worker.shutdown()  # behind all tests that it has been given
    deadline, next_at = time.monotonic() + within_s, 0.0
    while active and time.monotonic() < deadline:
        if time.monotonic() >= next_at:
            _interrupt(active)
            next_at = time.monotonic() + AGAIN_S + 1.0
        with contextlib.suppress(queue.Empty):
            event, told = session.queue.get(timeout=1.0)
            if event in ("workerfinished", "errordown"):
                active.discard(told["node"])
    for worker in active:
        say(f"worker {worker.gateway.id} did not end: look for its processes and for gw*- folders in /tmp")


def _interrupt(workers: set[Any]) -> None:
    for worker in workers:
        pid = worker.gateway._rinfo().pid  # known since it was started
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if psutil.Process(pid).ppid() == os.getpid():  # no other process has taken its PID
                os.kill(pid, signal.SIGINT)
