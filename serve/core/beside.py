"""What a load costs the other models of its GPUs: those that sleep there cannot wake before it ends, and from then on
all that do not fit beside one another take turns. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

Others = Sequence[tuple[tuple[int, ...], float]]
"""The GPUs of each engine of a node, and the seconds of waiting that a load on any of them costs."""

ACROSS = 4
"""Weight of two models that take turns and need different numbers of GPUs, as against two that need as many: while one
of them drains, the other GPUs of the larger one are idle too. Above 1 it also keeps the two kinds apart: where one kind
has more GPUs, that one goes there, and the other one elsewhere."""
TURN_S = 100.0
"""Seconds of waiting that a load counts for a weight of one: turns go on for hours, a load is over in minutes."""


def turns(gpus: int, others: int) -> int:
    """Weight of two models that do not fit beside one another, by the GPUs that an engine of each needs."""
    return 1 if gpus == others else ACROSS


def by_gpu(others: Others) -> dict[int, float]:
    """Each one's cost shared out to its GPUs: which are the best ones for a load, one by one."""
    found: dict[int, float] = {}
    for gpus, cost in others:
        for gpu in gpus:
            found[gpu] = found.get(gpu, 0.0) + cost / len(gpus)
    return found


def blocked_s(gpus: Collection[int], others: Others) -> float:
    """Of a load on all of ``gpus``: each that sleeps on any of them waits for it."""
    return sum(cost for theirs, cost in others if not set(theirs).isdisjoint(gpus))
