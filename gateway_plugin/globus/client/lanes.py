"""What the dispatcher keeps: prompts that wait, in lanes, and packs that are under way; and what becomes of a pack that
failed. Values and pure decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from gateway_plugin.globus.client.batches import Size
from gateway_plugin.globus.client.protocol import Place
from gateway_plugin.globus.client.transport import Next

RETRIES = 4
BACKOFF_S = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class File:
    """Lines of a JSONL file at the site: the lane's first one is number ``first``."""

    path: str
    sha256: str
    first: int = 0


@dataclass(frozen=True)
class LaneKey:
    """Prompts that may share a task: one model (a cold one holds up its own only), one way to wait, one budget."""

    group: str
    name: str
    """Letters and digits: the lane in its packs' keys."""
    model: str
    wait: bool
    timeout_s: float
    file: File | None = None
    """The calls are its lines, ``{"line": NUMBER}``."""
    total: int = 0
    """Prompts that there will be, where that is known."""


@dataclass(frozen=True)
class Call:
    """One prompt: what is asked, for whom, and until when (the client's clock)."""

    item: Mapping[str, Any]
    size: Size
    deadline: float
    read: Callable[[dict[str, Any]], Any] = field(compare=False)
    """What the caller wants of the answer's body."""
    future: Future[Any] = field(compare=False, default_factory=Future)


@dataclass(frozen=True)
class Pack:
    """Prompts that travel together under one key. Sent again, it has the same key."""

    lane: LaneKey
    place: Place
    key: str
    calls: tuple[Call, ...]
    attempt: int = 0

    @property
    def deadline(self) -> float:
        """Of the pack as a whole: its youngest prompt's. The others' futures end with their own."""
        return max(call.deadline for call in self.calls)


@dataclass(frozen=True)
class Verdict:
    """After a failure: send the pack again after ``delay_s``, in halves or whole; or give up."""

    action: Next
    delay_s: float = 0.0


def after_failure(then: Next, attempt: int, count: int, remaining_s: float) -> Verdict:
    """(1) Nothing helps. (2) Too large, one prompt: nothing helps; (3) more: halves, at once. (4) Again, while tries
    and time are left; (5) else give up.
    """
    if then is Next.NOTHING:  # (1)
        return Verdict(Next.NOTHING)
    if then is Next.SMALLER:
        return Verdict(Next.SMALLER if count > 1 else Next.NOTHING)  # (2) (3)
    delay_s = BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)]
    if attempt < RETRIES and delay_s < remaining_s:  # (4)
        return Verdict(Next.AGAIN, delay_s)
    return Verdict(Next.NOTHING)  # (5)


def halves(place: Place) -> tuple[Place, Place]:
    """Two places that cover ``place``."""
    first = place.count // 2
    return (
        Place(place.lane, place.start, first, place.total),
        Place(place.lane, place.start + first, place.count - first, place.total),
    )


def runs(numbers: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Ascending ``numbers`` as runs of consecutive ones, first and count, of at most ``most`` each."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        first, count = found[-1] if found else (number, 0)
        if found and number == first + count and count < most:
            found[-1] = (first, count + 1)
        else:
            found.append((number, 1))
    return found
