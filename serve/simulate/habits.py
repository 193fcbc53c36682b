"""Parts of pressure against possession: request rates of models, weight of waiting, worth of a place.

After max-weight scheduling of queues with switch-over times (Celik and Modiano, 2012), with what a switch costs others
as its hysteresis.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Numbers:
    """Every number with its unit and what it trades."""

    fast_s: float = 120.0
    slow_s: float = 600.0
    """Time constants of a model's learned rates: bursts, habits. Longer: idle models keep their place longer after a
    burst."""
    gaps: int = 200
    """How many of the last times between requests of a model are remembered."""
    hysteresis: float = 0.7
    """Seconds of waiting ended for each second of waiting that a switch causes. More: fewer switches, longer waits for
    rarely requested models."""
    impatience: float = 0.5
    """How much more a second of waiting weighs for each load time that the oldest waiter has waited. More: shorter long
    waits, more switches."""
    quantum: float = 1.0
    """A model that has requests keeps its place for so many of its load times. More: less of the devices' time lost,
    longer waits."""
    bound_loads: float = 4.0
    bound_s: float = 60.0
    """A model whose oldest waiter would wait longer than the larger of both is next, at any cost to others."""

    def pressure(self, ages_s: Sequence[float], load_s: float) -> float:
        """Weight of the waiters of one model, in seconds; the oldest first."""
        return sum(ages_s) * (1 + self.impatience * ages_s[0] / load_s)

    def overdue(self, oldest_s: float, load_s: float) -> bool:
        """Whether the bound would be passed if its load did not begin now."""
        return oldest_s >= max(self.bound_s, self.bound_loads * load_s) - load_s

    @staticmethod
    def loss(likely: float, rate: float, load_s: float) -> float:
        """Seconds of waiting that the loss of its place would cause to a model that is requested meanwhile with
        probability ``likely``: the first request waits for its load, and so do those during the load, ``rate`` a
        second."""
        return likely * load_s * (1 + rate * load_s / 2)


class Habits:
    """Request rate of each model: from waiters, and from counters that show that it was requested within a second."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers
        self._rates: dict[str, tuple[float, float, float]] = {}
        """Model -> fast, slow (requests a second), when."""
        self._used: dict[str, float] = {}
        self._gaps: dict[str, tuple[deque[float], list[float]]] = {}
        """Model -> the last times between two requests, as they came and in order of length."""

    def asked(self, model: str, now: float) -> None:
        if model in self._rates:
            recent, ordered = self._gaps.setdefault(model, (deque(), []))
            gap = now - self._rates[model][2]
            recent.append(gap)
            insort(ordered, gap)
            if len(recent) > self.numbers.gaps:
                del ordered[bisect_left(ordered, recent.popleft())]
        fast, slow = self._both(model, now)
        self._rates[model] = (fast + 1 / self.numbers.fast_s, slow + 1 / self.numbers.slow_s, now)

    def used(self, model: str, last_used: float, ready_at: float, now: float) -> None:
        """From its engine's counters. Requests that waited for the engine were counted on arrival."""
        if last_used > self._used.get(model, 0.0):
            self._used[model] = last_used
            if last_used > ready_at + 1.0:
                self.asked(model, now)

    def rate(self, model: str, now: float) -> float:
        """Expected requests a second; at most one a second is seen."""
        return max(self._both(model, now))

    def likely(self, model: str, away_s: float, now: float) -> float:
        """Probability of a request within ``away_s``: of the past intervals at least as long as the present one, the
        share that ended that soon; where there are few, by its rate."""
        if model not in self._rates:
            return 0.0
        by_rate = 1 - math.exp(-self.rate(model, now) * away_s)
        ordered = self._gaps[model][1] if model in self._gaps else []
        idle_s = now - self._rates[model][2]
        first = bisect_right(ordered, idle_s)
        soon = bisect_right(ordered, idle_s + away_s) - first
        return (soon + by_rate) / (len(ordered) - first + 1)

    def _both(self, model: str, now: float) -> tuple[float, float]:
        fast, slow, at = self._rates.get(model, (0.0, 0.0, now))
        past = now - at
        return fast * math.exp(-past / self.numbers.fast_s), slow * math.exp(-past / self.numbers.slow_s)
