"""How an engine works on its requests in flight: all at once, each the slower the more there are.

With ``n`` requests each one advances at ``1 / (1 + (n - 1) / beside)`` of its pace alone. The engine keeps the progress
of a request that was there from the start (``_clock``), so that an arrival or an end costs O(log n).
"""

from __future__ import annotations

import heapq


class Service:
    """Requests in flight on one engine. Times are the world's seconds and never go back."""

    def __init__(self, beside: float) -> None:
        self._beside = beside
        self._clock = 0.0
        self._at = 0.0
        self._ends: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._ends)

    def _advance(self, now: float) -> None:
        if self._ends:
            self._clock += (now - self._at) * self._pace()
        self._at = now

    def _pace(self) -> float:
        return 1 / (1 + (len(self._ends) - 1) / self._beside)

    def begin(self, request: int, alone_s: float, now: float) -> None:
        """``request`` is in flight from now on; alone it would take ``alone_s``."""
        self._advance(now)
        heapq.heappush(self._ends, (self._clock + alone_s, request))

    def next_end(self) -> float | None:
        """When the next one ends if none comes before."""
        if not self._ends:
            return None
        return self._at + max(0.0, self._ends[0][0] - self._clock) / self._pace()

    def end(self, now: float) -> int:
        """The request that ends now, as returned by ``next_end``."""
        self._advance(now)
        self._clock, request = heapq.heappop(self._ends)
        return request

    def cut(self) -> list[int]:
        """All requests in flight, when the engine ends."""
        cut = [request for _, request in self._ends]
        self._ends.clear()
        return cut
