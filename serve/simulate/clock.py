"""Virtual time."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable


class Clock:
    """What is to happen, in order of time; of what happens at once, in the order in which it was planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = 0

    def at(self, time: float, act: Callable[[], None]) -> None:
        self._planned += 1
        heapq.heappush(self._heap, (time if time > self.now else self.now, self._planned, act))

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        self.at(self.now + delay_s, act)

    def advance(self, until: float = math.inf) -> bool:
        """To the next thing, which happens. False: there is nothing more before ``until``, where time stands then."""
        if not self._heap or self._heap[0][0] > until:
            self.now = until if until < math.inf else self.now
            return False
        self.now, _, act = heapq.heappop(self._heap)
        act()
        return True
