"""Which requests travel together, when, and what becomes of a batch that failed. Values and pure decisions; time is an
argument.

Globus Compute takes 20 requests per 10 s and 10 MB a submission, and returns 10 MB a result. One task a request spends
that at once. So requests wait a moment for company, and one task carries many. A batch is cut when it is sent, not when
its first request comes: where the service limits the rate, batches grow instead of queueing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from gateway_plugin.channel import File
from gateway_plugin.globus.client.protocol import Span
from gateway_plugin.globus.client.transport import Next

RETRIES = 4
BACKOFF_S = (1.0, 2.0, 5.0, 10.0)
CHARS_PER_TOKEN = 6
"""Of an answer as JSON; generous, so that a batch's result stays below the limit. Where it does not, it is halved."""
UNKNOWN_TOKENS = 2048
VECTOR_BYTES = 24_576
"""4,096 numbers in base64, which the client asks for."""
ENVELOPE_BYTES = 1024


@dataclass(frozen=True)
class Limits:
    """What one task may carry, and how long a request waits for company."""

    request_bytes: int = 8_000_000
    """Of a batch's requests as they travel (JSON within JSON)."""
    answer_bytes: int = 8_000_000
    """Of a batch's answers, as far as can be guessed."""
    items: int = 64
    """More would gain nothing, and a batch is answered when its slowest request is."""
    lines: int = 512
    """Of a file at the site, instead of ``items``: for each batch the whole file is read, for its checksum."""
    flush_s: float = 0.05
    under_way: int = 64
    """Batches in flight: more would queue at the site, where they cannot be cancelled."""


@dataclass(frozen=True)
class Size:
    """What a request adds to a batch, and since when it waits (seconds of the client's clock)."""

    request_bytes: int
    answer_bytes: int
    since: float = 0.0


def size(item: Mapping[str, Any], since: float = 0.0) -> Size:
    """The size of ``{"path", "body"?}`` on its way there (exactly) and back (guessed).

    Raises ``TypeError`` or ``ValueError`` where the item is not JSON.
    """
    travelling = json.dumps(json.dumps(item, allow_nan=False))
    return Size(len(travelling), _answer_bytes(item.get("body")), since)


def _answer_bytes(body: object) -> int:
    if not isinstance(body, Mapping):
        return ENVELOPE_BYTES
    if "input" in body:
        count = len(body["input"]) if isinstance(body["input"], list) else 1
        return ENVELOPE_BYTES + count * VECTOR_BYTES
    tokens = body.get("max_completion_tokens") or body.get("max_tokens") or UNKNOWN_TOKENS
    choices = body.get("n") or 1
    known = all(isinstance(number, int) and number > 0 for number in (tokens, choices))
    return ENVELOPE_BYTES + (tokens * choices if known else UNKNOWN_TOKENS) * CHARS_PER_TOKEN


def cut(waiting: Sequence[Size], limits: Limits) -> int:
    """How many of the first requests make the next batch: as many as fit, one at least (0 of none).

    A request over a limit by itself travels alone, so that the service refuses no other.
    """
    requests = answers = 0
    for count, entry in enumerate(waiting[: limits.items]):
        requests += entry.request_bytes
        answers += entry.answer_bytes
        if count and (requests > limits.request_bytes or answers > limits.answer_bytes):
            return count
    return min(len(waiting), limits.items)


def due(waiting: Sequence[Size], limits: Limits) -> float | None:
    """When the next batch should be sent, the pace permitting: at once if it is full, else when its oldest request has
    waited long enough; ``None`` if nothing waits.
    """
    if not waiting:
        return None
    count = cut(waiting, limits)
    if count == limits.items or count < len(waiting):
        return waiting[0].since
    return waiting[0].since + limits.flush_s


@dataclass(frozen=True)
class Pace:
    """How often the service may be asked: ``requests`` in any ``window_s``, a little below what it documents (20 in 10
    s), since others (its own library, a login) ask as the same user, and a request takes its time to arrive.
    """

    requests: int = 18
    window_s: float = 10.5
    burst: int = 8
    """In any ``burst_s``; more, and the SDK's executor complains and waits by itself."""
    burst_s: float = 1.1
    spent: tuple[float, ...] = ()

    def next(self, now: float) -> float:
        """The earliest time for one more request."""
        allowed = now
        for count, window_s in ((self.requests, self.window_s), (self.burst, self.burst_s)):
            recent = [when for when in self.spent if when > now - window_s]
            if len(recent) >= count:
                allowed = max(allowed, recent[-count] + window_s)
        return allowed

    def spend(self, now: float) -> Pace:
        """This pace after a request at ``now``."""
        return replace(self, spent=(*(when for when in self.spent if when > now - self.window_s), now))


@dataclass(frozen=True)
class BatchKey:
    """Requests that may share a task: one model (loading it holds up its own requests only), one way to wait, one
    time limit.
    """

    group: str
    """Task group, a UUID."""
    name: str
    """Letters and digits: this sequence of requests in its batches' idempotency keys."""
    model: str
    wait: bool
    timeout_s: float
    file: File | None = None
    """The requests are lines of it, ``{"line": NUMBER}``."""
    total: int = 0
    """Requests that there will be, where that is known."""


@dataclass(frozen=True)
class Call:
    """One request: its content, its future, and its deadline (the client's clock)."""

    item: Mapping[str, Any]
    size: Size
    deadline: float
    read: Callable[[dict[str, Any]], Any] = field(compare=False)
    """What the caller wants of the answer's body."""
    future: Future[Any] = field(compare=False, default_factory=Future)


@dataclass(frozen=True)
class Batch:
    """Requests that travel together in one task. Sent again, it has the same idempotency key."""

    of: BatchKey
    span: Span
    key: str
    """Idempotency key."""
    calls: tuple[Call, ...]
    attempt: int = 0

    @property
    def deadline(self) -> float:
        """Of the batch as a whole: its youngest request's. The others' futures end with their own."""
        return max(call.deadline for call in self.calls)

    @property
    def next_deadline(self) -> float:
        """Of the next request that is not answered; infinite where there is none."""
        return min((call.deadline for call in self.calls if not call.future.done()), default=float("inf"))


def after_failure(then: Next, attempt: int, count: int, remaining_s: float) -> tuple[Next, float]:
    """What to do with a failed batch of ``count`` requests, and after how many seconds: (1) nothing helps; (2) too
    large, one request: nothing helps; (3) more: halves, at once; (4) again, while tries and time are left; (5) give up.
    """
    if then is Next.NOTHING:  # (1)
        return Next.NOTHING, 0.0
    if then is Next.SMALLER:
        return (Next.SMALLER if count > 1 else Next.NOTHING), 0.0  # (2) (3)
    delay_s = BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)]
    if attempt < RETRIES and delay_s < remaining_s:  # (4)
        return Next.AGAIN, delay_s
    return Next.NOTHING, 0.0  # (5)


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
