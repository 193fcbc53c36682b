"""How many engines the load of a model calls for, so that it neither follows every peak nor stays up for long. Pure.

Up and down have thresholds and times of their own: an engine more once the present ones have been above their target
for seconds, one less once fewer would have been far below theirs for minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Spread:
    """Of one model with ``replicas_max`` above 1."""

    wanted: int = 1
    """Engines that it should have as long as it has any."""
    set_at: float = 0.0
    """When ``wanted`` last changed."""
    towards: int = 1
    """What its load calls for since ``since``: the least of it above ``wanted``, the most of it below."""
    since: float = 0.0
    """Meaningless while ``towards`` equals ``wanted``."""


def engines_for(load: int, target: float, most: int) -> int:
    """The fewest engines with at most ``target`` requests each: 1 to ``most``."""
    return min(most, max(1, math.ceil(load / target)))


def advance(spread: Spread, have: int, rise: int, fall: int, now: float, *, rise_s: float, fall_s: float) -> Spread:
    """``spread`` after a reading of the load; the same object where nothing changed.

    ``have``: engines that serve or load. ``rise``: what the load calls for; ``fall``, no less: what would be enough
    with a reserve.

    (1) it calls for more: as many as it has called for all the time, after ``rise_s``;
    (2) for fewer, and those above that were never started: after ``rise_s``, no fewer than there are;
    (3) fewer would be enough even with a reserve: as many as would have been enough all the time, after ``fall_s``;
    (4) neither.
    """
    wanted, patience_s = spread.wanted, rise_s
    if rise > wanted:  # (1)
        level = min(rise, spread.towards) if spread.towards > wanted else rise
    elif wanted > max(have, rise):  # (2)
        level = max(have, rise, 1)
    elif fall < wanted:  # (3)
        level, patience_s = (max(fall, spread.towards) if spread.towards < wanted else fall), fall_s
    else:  # (4)
        return spread if spread.towards == wanted else replace(spread, towards=wanted, since=now)
    same_way = spread.towards != wanted and (spread.towards > wanted) == (level > wanted)
    since = spread.since if same_way else now
    if now >= since + patience_s:
        return Spread(level, now, level, now)
    return spread if (level, since) == (spread.towards, spread.since) else replace(spread, towards=level, since=since)
