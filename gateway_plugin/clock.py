"""Clock for decisions: steady, independent of changes to the wall clock.

The wall clock is for times that people read, that must survive a restart, or that come from another machine. Such a
time is converted on input (``SteadyClock.steady``) and on output (``SteadyClock.wall``) by its distance from now, so
that setting the clock meanwhile has no effect.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_SAME_S = 0.1
"""Smaller differences count as none: the clocks are read one after the other, and the kernel slews one of them."""


class SteadyClock:
    """Seconds since the epoch: the wall clock at creation, continued by a monotonic clock."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._base = wall() - monotonic()

    def now(self) -> float:
        """Never goes back, never jumps. Close to the wall clock until that is set."""
        return self._base + self._monotonic()

    def steady(self, at: float, *, latest: float | None = None) -> float:
        """Convert the wall clock's ``at``, by its distance from now, to this clock.

        ``latest``: for past events, this clock's now: a later result means that the wall clock was set back since.
        """
        found = at + self._ahead_s()
        return found if latest is None else min(found, latest)

    def wall(self, at: float) -> float:
        """Convert this clock's ``at`` to the wall clock."""
        return at - self._ahead_s()

    def _ahead_s(self) -> float:
        """How far this clock is ahead of the wall clock: by how much that was set back."""
        ahead_s = self.now() - self._wall()
        return ahead_s if abs(ahead_s) > _SAME_S else 0.0
