"""Whether an engine that has work makes progress: samples in, a verdict out. Pure; times are of a monotonic clock.

``GET /health`` of an engine shows that its front end answers, not that anything is computed behind it. Its metrics do,
where it has them (vLLM's). Where it has none, or they stand still, one small request decides: an engine that answers it
works, however slow the others are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto

_LINE = re.compile(r"^(vllm:[a-z_]+)(?:\{(.*)\})? ([^ ]+)")
IN_FLIGHT = frozenset({"vllm:num_requests_running", "vllm:num_requests_waiting"})
"""vLLM's gauges: set after each step of its scheduler, so that they stand still with it."""
PROGRESS = frozenset(
    {
        "vllm:generation_tokens_total",
        "vllm:prompt_tokens_total",
        "vllm:request_success_total",
        "vllm:kv_cache_usage_perc",
    }
)
"""Counters that change while vLLM works: the last one also in the middle of a long prompt, piece by piece."""
_ABORTED = 'finished_reason="abort"'
"""An aborted request: no progress of the engine's."""


@dataclass(frozen=True)
class Counters:
    """An engine's own counters."""

    in_flight: int
    progress: tuple[float, ...]
    """Changes with each piece of work; what it counts does not matter."""


def counters_of(metrics: str) -> Counters | None:
    """The counters in the text of ``GET /metrics`` (Prometheus' form); ``None``: it has none that are known here."""
    in_flight: float | None = None
    progress: dict[str, float] = {}
    for line in metrics.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        name, labels, text = found.groups()
        if (name not in IN_FLIGHT and name not in PROGRESS) or _ABORTED in (labels or ""):
            continue
        try:
            value = float(text)
        except ValueError:
            continue
        if name in IN_FLIGHT:
            in_flight = (in_flight or 0.0) + value
        else:
            progress[name] = progress.get(name, 0.0) + value
    if in_flight is None or not progress or not 0 <= in_flight < 1e9:
        return None
    return Counters(int(in_flight), tuple(progress[name] for name in sorted(progress)))


@dataclass(frozen=True)
class Sample:
    """One sample of an engine."""

    at: float
    counters: Counters | None = None
    """``None``: it has none, or did not give them in time."""
    signs: int = 0
    """Number of small requests it has answered, or times that the edge has seen bytes come after a still while."""
    told: int = 0
    """In flight by the edge's count, which is reported only while nothing comes out of the engine."""


@dataclass(frozen=True)
class Watch:
    """Result of the samples so far."""

    moved_at: float
    """When it last made progress, or had nothing to do."""
    counters: Counters | None = None
    """Its last counters."""
    signs: int = 0
    in_flight: int = 0

    def still_s(self, now: float) -> float:
        """For how long it has made no progress."""
        return max(0.0, now - self.moved_at)


def observe(watch: Watch | None, sample: Sample) -> Watch:
    """Add one sample.

    (1) the first; (2) nothing is in flight, by its own count or the edge's: no progress is expected; counters that are
    missing count as unchanged; (3) its counters changed, or there was a sign of life: progress; (4) else none.
    """
    if watch is None:  # (1)
        watch = Watch(sample.at, sample.counters, sample.signs)
    counters = sample.counters or watch.counters
    in_flight = sample.told or (counters.in_flight if counters is not None else 0)  # (2)
    before = watch.counters.progress if watch.counters is not None else ()
    changed = counters is not None and counters.progress != before  # (3)
    moves = in_flight == 0 or changed or sample.signs > watch.signs
    return Watch(sample.at if moves else watch.moved_at, counters, sample.signs, in_flight)  # (4)


class Verdict(Enum):
    """Action for an engine."""

    WELL = auto()
    DOUBTED = auto()
    """Send it a small request, if none is under way."""
    STALLED = auto()
    """As ``DOUBTED``, and reported to the controller."""
    HUNG = auto()
    """End it."""


def judge(watch: Watch, now: float, hang_after_s: float) -> Verdict:
    """The verdict: hung after ``hang_after_s`` without progress, stalled after half of it, doubted after a quarter.
    ``hang_after_s`` 0: always well."""
    still_s = watch.still_s(now)
    if hang_after_s <= 0 or still_s < hang_after_s / 4:
        return Verdict.WELL
    if still_s < hang_after_s / 2:
        return Verdict.DOUBTED
    return Verdict.STALLED if still_s < hang_after_s else Verdict.HUNG


def look_every_s(hang_after_s: float) -> float:
    """Pause between samples, and timeout of each: at most 2 s, so that a hang is detected soon."""
    return min(2.0, hang_after_s / 10)
