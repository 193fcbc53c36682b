"""Results of a run: every request's wait, the service of users, the use of the devices."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


class Outcome(Enum):
    """How a request ended; each has exactly one."""

    SERVED = "served"
    REFUSED = "refused"
    """Refused: mostly because it waited for too long."""
    CUT = "cut"
    """In flight on an engine that was stopped at its drain's deadline."""
    LEFT = "left"
    """Still waiting or in flight when the run was ended."""


class Span(NamedTuple):
    """An engine's state on its devices for a while; for the picture of a day."""

    engine: str
    node: str
    gpus: tuple[int, ...]
    share: float
    """Of each GPU's memory."""
    model: str
    state: str
    """loading, ready, draining, falling-asleep, asleep, waking or stopping."""
    begin: float
    end: float


@dataclass
class _User:
    work_s: float = 0.0
    """Of the served requests, alone on an engine."""
    pending: int = 0
    since: float = 0.0
    pending_s: float = 0.0
    """Time during which at least one of its requests was neither served nor refused."""


@dataclass
class Tally:
    """Collected while a run goes on."""

    waits_s: array[float] = field(default_factory=lambda: array("d"))
    """From arrival until an engine has the request; of those without one until they were refused or the run ended."""
    past_bound: int = 0
    """Requests that waited for longer than ``Times.bound_s`` of their model."""
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    switches: int = 0
    """Engines that were started or woken on devices which an engine of another model had left."""
    loads: int = 0
    sleeps: int = 0
    wakes: int = 0
    device_s_lost: float = 0.0
    """GPUs times seconds in which an engine loaded, woke or fell asleep there."""
    gpu_s: float = 0.0
    """GPUs times seconds that nodes were held."""
    work_s: float = 0.0
    """Of all served requests, alone on an engine."""
    end_s: float = 0.0
    spans: list[Span] = field(default_factory=list)
    users: dict[str, _User] = field(default_factory=dict)

    def waited(self, wait_s: float, bound_s: float) -> None:
        self.waits_s.append(wait_s)
        self.past_bound += wait_s > bound_s

    def arrives(self, user: str, now: float) -> None:
        mine = self.users.setdefault(user, _User())
        if mine.pending == 0:
            mine.since = now
        mine.pending += 1

    def ends(self, user: str, outcome: Outcome, alone_s: float, now: float) -> None:
        self.outcomes[outcome] += 1
        mine = self.users[user]
        if outcome is Outcome.SERVED:
            mine.work_s += alone_s
            self.work_s += alone_s
        mine.pending -= 1
        if mine.pending == 0:
            mine.pending_s += now - mine.since

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())

    @property
    def progress(self) -> dict[str, float]:
        """User -> seconds of work done for it for each second in which it had something pending, at most 1."""
        return {
            name: min(1.0, user.work_s / user.pending_s) if user.pending_s > 0 else 1.0
            for name, user in self.users.items()
        }

    @property
    def jain(self) -> float:
        """Jain's index of the users' progress. One whose own backlog fills the time has 1; one that waits behind the
        backlog of another has less."""
        return jain(self.progress.values())

    def jain_to(self, alone: Mapping[str, float]) -> float:
        """Jain's index of what is left to each user of its progress alone on the fleet (user -> ``progress`` there)."""
        return jain(min(1.0, mine / alone[user]) if alone[user] else 1.0 for user, mine in self.progress.items())

    def document(self) -> dict[str, float | int]:
        """One cell of the JSON."""
        waits = sorted(self.waits_s)
        return {
            "switches": self.switches,
            "wait_mean_s": round(sum(waits) / max(1, len(waits)), 3),
            "wait_p50_s": round(quantile(waits, 0.5), 3),
            "wait_p95_s": round(quantile(waits, 0.95), 3),
            "wait_p99_s": round(quantile(waits, 0.99), 3),
            "wait_max_s": round(quantile(waits, 1.0), 3),
            "device_s_lost": round(self.device_s_lost, 1),
            "gpu_hours": round(self.gpu_s / 3600, 3),
            "jain": round(self.jain, 4),
        }

    def over(self, seconds: float) -> float:
        """Share of the requests that waited longer."""
        return sum(wait > seconds for wait in self.waits_s) / max(1, len(self.waits_s))


def jain(shares: Iterable[float]) -> float:
    """Square of the sum over count times sum of squares (Jain, Chiu, Hawe 1984): 1 if all are equal; 1 for none."""
    found = list(shares)
    squares = sum(share * share for share in found)
    return sum(found) ** 2 / (len(found) * squares) if squares else 1.0


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of the values do not exceed; 0 of none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
