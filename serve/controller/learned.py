"""The file of what the controller has learned of its models, so that the next one need not learn it anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from gateway_plugin.state_file import State
from serve.core.habits import BINS, Habit
from serve.core.learned import Learned

Amount = Annotated[float, Field(ge=0, le=1e9)]
_DIGITS = 4


class KeptHabit(State):
    """A ``Habit``; ``last`` by the wall clock."""

    last: Annotated[float, Field(allow_inf_nan=False)]
    fast: Amount
    slow: Amount
    pauses: Annotated[tuple[Amount, ...], Field(min_length=BINS, max_length=BINS)]


_Rows = dict[str, Amount]


class KeptLearned(State):
    """``learned.json``."""

    habits: dict[str, KeptHabit] = Field(default_factory=dict)
    follows: dict[str, tuple[tuple[str, Amount], ...]] = Field(default_factory=dict)
    load_s: _Rows = Field(default_factory=dict)
    wake_s: _Rows = Field(default_factory=dict)
    drain_s: _Rows = Field(default_factory=dict)


def kept(learned: Learned, wall: Callable[[float], float]) -> KeptLearned:
    """``learned`` for the file. ``wall`` converts a time of the controller's clock."""
    habits = {
        model: replace(habit, last=wall(habit.last), pauses=tuple(round(many, _DIGITS) for many in habit.pauses))
        for model, habit in learned.habits.items()
    }
    took_s = (_finite(rows) for rows in (learned.load_s, learned.wake_s, learned.drain_s))
    return KeptLearned.model_validate(Learned(habits, learned.follows, *took_s), from_attributes=True)


def _finite(rows: Mapping[str, float]) -> dict[str, float]:
    return {model: took_s for model, took_s in rows.items() if math.isfinite(took_s)}


def given_back(found: KeptLearned, steady: Callable[[float], float]) -> Learned:
    """What ``kept`` made, ``steady`` converting back."""
    habits = {name: Habit(steady(one.last), one.fast, one.slow, one.pauses) for name, one in found.habits.items()}
    return Learned(habits, found.follows, found.load_s, found.wake_s, found.drain_s)
