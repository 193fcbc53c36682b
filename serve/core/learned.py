"""What a controller learns of its models, apart from their state: the next one begins with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.core.callers import Next
from serve.core.habits import Habit
from serve.core.state import Fleet


@dataclass(frozen=True)
class Learned:
    """By model; each has the meaning that it has in ``Fleet``."""

    habits: Mapping[str, Habit] = field(default_factory=dict)
    follows: Mapping[str, Next] = field(default_factory=dict)
    load_s: Mapping[str, float] = field(default_factory=dict)
    wake_s: Mapping[str, float] = field(default_factory=dict)
    drain_s: Mapping[str, float] = field(default_factory=dict)


def learned(fleet: Fleet) -> Learned:
    """What ``fleet`` has learned."""
    return Learned(fleet.habits, fleet.follows, fleet.load_s, fleet.wake_s, fleet.drain_s)
