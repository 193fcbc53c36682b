"""How much each waiter counts where models compete for room. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from serve.core.events import Priority
from serve.core.state import Waiter

_CLASS_WEIGHT = {Priority.INTERACTIVE: 1.0, Priority.BATCH: 0.2}
"""A batch request outweighs an interactive one once it has waited five times as long."""


def weights(waiters: Sequence[Waiter]) -> list[float]:
    """The weight of each waiter of one model, in the order given: seconds of its waiting count so much."""
    return [_CLASS_WEIGHT[waiter.requester.priority] for waiter in waiters]
