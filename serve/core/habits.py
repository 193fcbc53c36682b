"""How often a model is requested, learned from its waiters and from the edge's counters. Pure, of a fixed size.

What is learned is when an unused model is asked again: of the pauses between its uses that were as long as the present
one, how many ended so soon. Older pauses count less. A pause is counted in bins whose width grows with its length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PAUSE_S = 2.0
"""Shorter pauses are none: the model is in use."""
_GROWTH = 1.35
BINS = 34
"""Lengths of pauses that are counted apart."""
"""The last one begins at 2 s * 1.35^33: 11 hours."""
_BOUNDS = tuple(PAUSE_S * _GROWTH**index for index in range(BINS))
_LOG_GROWTH = math.log(_GROWTH)
_KEPT = 0.98
"""Each pause makes the earlier ones count 2 % less: the last 50 matter."""
_FAST_S, _SLOW_S = 120.0, 600.0
"""Time constants of the request rate: bursts, and the last ten minutes."""
NOTED_EACH_S = 10.0
"""A model in use is noted so often."""


@dataclass(frozen=True)
class Habit:
    """What is known of one model's requests."""

    last: float
    """When it was last noted as used."""
    fast: float = 0.0
    slow: float = 0.0
    """Seconds with requests per second, over the last two and the last ten minutes, at ``last``."""
    pauses: tuple[float, ...] = (0.0,) * BINS
    """How many pauses of each length, older ones counting less."""


def noted(habit: Habit | None, now: float, *, paused: bool) -> Habit:
    """After a use at ``now``. ``paused``: since the last one nothing was in flight."""
    if habit is None:
        return Habit(now, 1 / _FAST_S, 1 / _SLOW_S)
    past = max(0.0, now - habit.last)
    used_s = 1.0 if paused else min(past, NOTED_EACH_S * 2)
    fast = habit.fast * math.exp(-past / _FAST_S) + used_s / _FAST_S
    slow = habit.slow * math.exp(-past / _SLOW_S) + used_s / _SLOW_S
    pauses = habit.pauses
    if paused and past >= PAUSE_S:
        index = _bin(past)
        pauses = tuple(_KEPT * many + (place == index) for place, many in enumerate(pauses))
    return Habit(now, fast, slow, pauses)


def rate(habit: Habit | None, now: float) -> float:
    """Requests a second: of those that waited all, of the others at most one a second is seen."""
    if habit is None:
        return 0.0
    past = max(0.0, now - habit.last)
    return max(habit.fast * math.exp(-past / _FAST_S), habit.slow * math.exp(-past / _SLOW_S))


def busy(habit: Habit | None, now: float) -> float:
    """Share of the last ten minutes in which it was used."""
    return 0.0 if habit is None else min(1.0, habit.slow * math.exp(-max(0.0, now - habit.last) / _SLOW_S))


def likely(habit: Habit | None, within_s: float, now: float) -> float:
    """Probability that an unused model is asked within ``within_s``: of the pauses at least as long as the present one,
    the share that ended that soon; the fewer there are, the more its rate counts."""
    if habit is None:
        return 0.0
    past = max(0.0, now - habit.last)
    by_rate = 1 - math.exp(-rate(habit, now) * within_s)
    longer = _longer_than(habit.pauses, past)
    soon = longer - _longer_than(habit.pauses, past + within_s)
    return min(1.0, (soon + by_rate) / (longer + 1))


def _bin(pause_s: float) -> int:
    return min(BINS - 1, int(math.log(pause_s / PAUSE_S) / _LOG_GROWTH))


def _longer_than(pauses: tuple[float, ...], past_s: float) -> float:
    """How many were longer; within a bin in proportion."""
    if past_s <= PAUSE_S:
        return sum(pauses)
    index = _bin(past_s)
    low = _BOUNDS[index]
    share = min(1.0, (past_s - low) / (low * (_GROWTH - 1)))
    return pauses[index] * (1 - share) + sum(pauses[index + 1 :])
