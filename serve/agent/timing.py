"""Timeouts of an agent."""

from __future__ import annotations

from dataclasses import dataclass, field

from serve.agent.sleeping import Patience


@dataclass(frozen=True)
class Timing:
    """Timeouts of an agent, in seconds."""

    poll_s: float = 0.2
    """Between checks of a process, and at first between probes of a loading engine."""
    probe_max_s: float = 1.0
    """Upper bound of the back-off between probes of a loading engine."""
    health_every_s: float = 5.0
    health_timeout_s: float = 10.0
    ill_after_s: float = 60.0
    """An engine whose health check fails for this time is hung. Long: a busy engine is not a dead one."""
    first_answer_s: float = 120.0
    """Timeout of the one real request."""
    grace_s: float = 10.0
    """From SIGTERM to SIGKILL."""
    device_wait_s: float = 30.0
    """How long a stop waits for another engine that loads, stops, falls asleep or wakes on one of its GPUs."""
    measure_every_s: float = 60.0
    """Between measurements of the host memory of an engine that serves."""
    patience: Patience = field(default_factory=Patience)
    """With sleep and wake."""
