"""The gateway's own controller as a decider of the simulated world."""

from __future__ import annotations

import math

from serve.core.effects import Effect
from serve.core.events import Event
from serve.core.policy import Policy
from serve.core.step import DEFAULT, initial, step
from serve.core.transaction import Policies

FIXED = Policy(slots=256, waiting_max=1_000_000, block_idle_s=math.inf, block_unused_s=None, last_block_idle_s=math.inf)
"""The gateway's policy, for a fleet of fixed size with an unlimited queue."""


class Core:
    """``serve.core.step``, as the gateway runs it."""

    def __init__(self, policy: Policy | None = None, policies: Policies = DEFAULT) -> None:
        self.policies = policies
        self.fleet = initial(policy or FIXED)

    def tell(self, event: Event, now: float) -> tuple[Effect, ...]:
        self.fleet, effects = step(self.fleet, event, now, self.policies)
        return effects
