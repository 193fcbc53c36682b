"""The queue of one cluster, read once for all its node types."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gateway_plugin.schedulers.base import SchedulerSilent

SHARED_S = 2.0
"""How long one answer of the queue serves the other node types, and one silence all of them."""

_WANTED_S = 60.0
"""How long the jobs of a node type that polls no more are asked for: one that has a job polls several times in it."""

_SLOW_S = 5.0
"""A command that fails after this long has waited for a scheduler that is away."""


class Row(Protocol):
    """What a scheduler reports of one job."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...


Rows = Mapping[str, Any]
"""``Row`` by job number."""


@dataclass(frozen=True)
class Answer:
    """What a scheduler said of jobs: one that is in neither field is unknown to it."""

    rows: Rows
    unanswered: frozenset[str] = frozenset()
    """Numbers of jobs of which nothing was said that can be read. They keep no other job waiting."""


class QueueReader:
    """The queue of one cluster, read once for all its node types.

    In a round of polls the first node type runs the command and the others use its answer. A scheduler that does not
    answer costs one timeout a round, independent of the number of node types.
    """

    def __init__(self, read: Callable[[frozenset[str]], Answer], clock: Callable[[], float] = time.monotonic) -> None:
        """``read``: the answer about the jobs with these numbers, and maybe more; raises ``SchedulerSilent``."""
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        self._wanted: dict[str, tuple[frozenset[str], float]] = {}
        """By node type: its jobs, and when it last asked."""
        self._used: set[str] = set()
        """The node types that had the latest answer: none gets the same answer twice."""
        self._covered: frozenset[str] = frozenset()
        self._answer = Answer({})
        self._silence: SchedulerSilent | None = None
        self._slow = False
        self._at = float("-inf")

    @property
    def silent(self) -> bool:
        """Whether the scheduler has just failed to answer."""
        return self._silence is not None and self._clock() < self._at + SHARED_S

    @property
    def away(self) -> bool:
        """Whether it has just failed to answer after a timeout, which the next command would reach too."""
        return self.silent and self._slow

    def answer(self, reader: str, numbers: Iterable[str]) -> Answer:
        """About the jobs ``numbers``, and maybe more. ``reader``: who asks. Raises ``SchedulerSilent``."""
        with self._lock:
            wanted = frozenset(numbers)
            self._wanted[reader] = wanted, self._clock()
            if self.silent and self._silence is not None:
                raise self._silence
            fresh = self._clock() < self._at + SHARED_S and self._silence is None
            if not (fresh and reader not in self._used and wanted <= self._covered):
                self._ask()
            self._used.add(reader)
            return self._answer

    def _ask(self) -> None:
        began = self._clock()
        self._wanted = {reader: known for reader, known in self._wanted.items() if known[1] > began - _WANTED_S}
        covered = frozenset[str]().union(*(numbers for numbers, _ in self._wanted.values()))
        try:
            self._answer, self._covered, self._silence = self._read(covered), covered, None
        except SchedulerSilent as silence:
            self._silence = silence
        self._at = self._clock()  # not after any other error: an earlier answer would pass for a new one
        self._slow = self._at - began >= _SLOW_S
        self._used.clear()
        if self._silence is not None:
            raise self._silence
