"""Which prompts travel together, and when: pure decisions; time is an argument.

Globus Compute takes 20 requests per 10 s and 10 MB a submission, and gives back 10 MB a result. One task a prompt
spends that at once. So prompts wait a moment for company, and one task carries many. A pack is cut when it is sent, not
when its first prompt comes: where the service makes us wait, packs grow instead of queueing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

CHARS_PER_TOKEN = 6
"""Of an answer as JSON; generous, so that a pack's result stays below the limit. Where it does not, it is halved."""
UNKNOWN_TOKENS = 2048
VECTOR_BYTES = 24_576
"""4,096 numbers in base64, which the client asks for."""
ENVELOPE_BYTES = 1024


@dataclass(frozen=True)
class Limits:
    """What one task may carry, and how long a prompt waits for company."""

    request_bytes: int = 8_000_000
    """Of a pack's requests as they travel (JSON within JSON)."""
    answer_bytes: int = 8_000_000
    """Of a pack's answers, as far as can be guessed."""
    items: int = 64
    """More would gain nothing, and a pack is answered when its slowest prompt is."""
    lines: int = 512
    """Of a file at the site, instead of ``items``: each pack has the whole file read, for its checksum."""
    flush_s: float = 0.05
    under_way: int = 64
    """Packs at the site or on their way: more would queue there, where nobody can take them back."""


@dataclass(frozen=True)
class Size:
    """What a prompt adds to a pack, and since when it waits (seconds of the client's clock)."""

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
    """How many of the first prompts make the next pack: as many as fit, one at least (0 of none).

    A prompt over a limit by itself travels alone: the service's refusal is its own.
    """
    requests = answers = 0
    for count, entry in enumerate(waiting[: limits.items]):
        requests += entry.request_bytes
        answers += entry.answer_bytes
        if count and (requests > limits.request_bytes or answers > limits.answer_bytes):
            return count
    return min(len(waiting), limits.items)


def due(waiting: Sequence[Size], limits: Limits) -> float | None:
    """When the next pack should be sent, the pace permitting: at once if it is full, else when its oldest prompt has
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
