"""How long it takes to get a node, and how long one stays: arithmetic over the blocks seen so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from heapq import nlargest
from statistics import median

from gateway_plugin.phases import BlockPhase
from serve.core.events import SeenBlock
from serve.core.state import Fleet, Node, NodePhase
from serve.core.transaction import Transaction

LATELY = 5
"""How many of the last blocks of a type count for its queue and start times."""


def queue_waits(blocks: Iterable[SeenBlock], now: float) -> Mapping[str, float]:
    """Type -> the longest of its last queue times in seconds."""
    return {kind: max(some) for kind, some in waited_s(blocks, now).items()}


def waited_s(blocks: Iterable[SeenBlock], now: float) -> Mapping[str, list[float]]:
    """Type -> queue times in seconds of its last ``LATELY`` blocks that started, in the order of starting."""
    started: dict[str, list[tuple[float, str, float]]] = {}
    for block in blocks:
        starts_at = block.starts_at if block.phase is BlockPhase.RUNNING else _started_at(block, now)
        if starts_at is not None:
            started.setdefault(block.type, []).append((starts_at, block.name, block.asked_at))
    last = {kind: nlargest(LATELY, some)[::-1] for kind, some in started.items()}
    return {kind: [max(0.0, starts_at - asked_at) for starts_at, _, asked_at in some] for kind, some in last.items()}


def _started_at(block: SeenBlock, now: float) -> float | None:
    """When its job started; ``None``: it did not. For one that may never have run (no host known), a start in the
    future or after its end is only the forecast that the scheduler gave while it was in the queue."""
    if block.starts_at is None or block.phase.queued:
        return None
    if block.phase in (BlockPhase.RUNNING, BlockPhase.COMPLETED, BlockPhase.EXPIRED) or block.host is not None:
        return block.starts_at
    until = now if block.ended_at is None else block.ended_at
    return block.starts_at if block.starts_at <= until else None


def wait_for_node_s(known: Transaction | Fleet, kind: str) -> float:
    """Seconds from the request of a node of type ``kind`` until it can take an engine, by the last few."""
    return known.queue_wait_s.get(kind, known.policy.queue_wait_guess_s) + start_s(known, kind)


def start_s(known: Transaction | Fleet, kind: str) -> float:
    """Seconds from the start of a job of type ``kind`` until its node can take an engine."""
    rows = known.block_start_s.rows if isinstance(known, Transaction) else known.block_start_s
    took = [seconds for _, seconds in rows.get(kind, ())]
    return median(took) if took else known.policy.block_start_guess_s


def takes(tx: Transaction, model: str, *, ending: bool) -> Callable[[Node], bool]:
    """Whether a node would serve ``model`` for at least as long as it takes to load there, as far as is known, or is in
    the first half of its time; ``ending``: for nodes near their end, else for the others."""
    until = tx.now + 2 * tx.load_time_s(model)

    def would(node: Node) -> bool:
        if node.phase is not NodePhase.UP or node.ending is not ending:
            return False
        return node.drain_at is None or until <= node.drain_at or (node.half_at is not None and tx.now < node.half_at)

    return would
