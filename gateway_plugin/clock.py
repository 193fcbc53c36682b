"""Time to decide by. It passes evenly, whatever is done to the wall clock.

The wall clock is for what people read and for what must survive a restart or comes from another machine; such a time is
converted where it comes in (``SteadyClock.steady``) and where it goes out (``SteadyClock.wall``): by its distance from
now, so that a clock that was set meanwhile does not matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_SAME_S = 0.1
"""Clocks that differ by less are taken for equal: reading one after the other takes time, and the kernel slews one."""


class SteadyClock:
    """Seconds since the epoch: what the wall clock said when this was made, counted on by a monotonic clock."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._base = wall() - monotonic()

    def now(self) -> float:
        """Never goes back, never jumps. Near the wall clock as long as nobody sets that."""
        return self._base + self._monotonic()

    def steady(self, at: float, *, latest: float | None = None) -> float:
        """The wall clock's ``at`` by this clock, as far from now as it is from the wall clock's now.

        ``latest``: for what happened already, this clock's now: if ``at`` is later, the wall clock was set back since.
        """
        found = at + self._ahead_s()
        return found if latest is None else min(found, latest)

    def wall(self, at: float) -> float:
        """This clock's ``at`` by the wall clock."""
        return at - self._ahead_s()

    def _ahead_s(self) -> float:
        """How much later this clock is than the wall clock: by how much that was set back."""
        ahead_s = self.now() - self._wall()
        return ahead_s if abs(ahead_s) > _SAME_S else 0.0
