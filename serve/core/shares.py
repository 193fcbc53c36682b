"""How much each waiter counts where models compete for room, and in which order waiters are released. Pure.

Both look at two things of a waiter: its class, and how many of its requester's wait in that class already. So a
requester who sends 500 requests at once neither outweighs the others nor goes before their first ones. A waiter that
names neither key nor caller is a requester of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from serve.core.events import Priority
from serve.core.state import Waiter

_BATCH_WEIGHT = 0.2
"""A batch request outweighs an interactive one once it has waited five times as long."""


def weights(waiters: Sequence[Waiter]) -> list[float]:
    """The weight of each waiter, in the order given: each second of its waiting counts so much.

    The n-th oldest of one requester in one class weighs 1/n of what the first one does. In all a requester weighs the
    harmonic sum: one request 1, ten 2.9, five hundred 6.8. Twice as many requests add 0.7, however many there were, so
    that no number of them stands for many users; yet none is worth nothing, so that a model never loses weight by
    another waiter. (1/n and not a fixed sum shared out, which would lower the weight of those that wait already.)

    ``waiters``: of one model; of several, where a requester's share is to span them.
    """
    return [
        (_BATCH_WEIGHT if waiter.requester.priority is Priority.BATCH else 1.0) / (1 + before)
        for waiter, before in zip(waiters, _before(waiters), strict=True)
    ]


def release_order(waiters: Iterable[Waiter]) -> list[Waiter]:
    """The waiters of one model in the order in which they are released: those with a client first; interactive before
    batch; in a class the oldest of each requester, then the second oldest of each, and so on, the older one first;
    of the same age in the order given."""
    given = list(waiters)
    if len(given) < 2:
        return given
    ranked = zip(given, _before(given), strict=True)
    ordered = sorted(
        ranked,
        key=lambda pair: (
            pair[0].unattended,
            pair[0].requester.priority is Priority.BATCH,
            pair[1],
            pair[0].since,
        ),
    )
    return [waiter for waiter, _ in ordered]


def positions(waiters: Iterable[Waiter]) -> dict[str, int]:
    """Ticket -> its position among the waiters of its model, 1 for the next to be released."""
    return {waiter.ticket: position for position, waiter in enumerate(release_order(waiters), 1)}


def _before(waiters: Sequence[Waiter]) -> list[int]:
    """How many older waiters of the same requester and class each one has."""
    # By plain tuples: the hash of a dataclass or an enum is computed in Python, a thousand times in a step.
    counts: dict[tuple[str, str, bool], int] = {}
    before = [0] * len(waiters)
    since = [waiter.since for waiter in waiters]
    for index in sorted(range(len(waiters)), key=since.__getitem__):
        one = waiters[index].requester
        if one.key or one.caller:
            named = (one.key, one.caller, one.priority is Priority.BATCH)
            before[index] = counts.get(named, 0)
            counts[named] = before[index] + 1
    return before
