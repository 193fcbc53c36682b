"""What a load costs those that sleep on the same GPUs: they cannot wake before it ends. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

Others = Sequence[tuple[tuple[int, ...], float]]
"""The GPUs of each engine that sleeps on a node, and the seconds of waiting that a load on any of them costs."""


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
