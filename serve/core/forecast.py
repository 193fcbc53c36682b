"""What is expected: the state of a model, when it serves, and what it waits for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gateway_plugin.phases import BlockPhase
from serve.core.events import SeenBlock
from serve.core.node_times import start_s
from serve.core.room import Need, Room, holds, need_of, wait_s, wait_words, waits_for
from serve.core.state import EngineState, Fleet, Node, NodePhase, RouteState, live, serving, stalled, stays


class Expected(NamedTuple):
    """The first node that could hold something and has not joined yet."""

    in_s: float | None
    """Seconds until it can take an engine; ``None``: nobody knows."""
    words: str
    """What it waits for, in the scheduler's words."""


def blocks_of(fleet: Fleet) -> Mapping[str, SeenBlock]:
    """Node -> its block. Which block a pending node will join from is not known: they are matched in the order of
    asking, blocks that run before those that wait."""
    known = {node.id: fleet.blocks[node.block] for node in fleet.nodes.values() if node.block in fleet.blocks}
    pending: dict[str, list[Node]] = {}
    for node in sorted(fleet.nodes.values(), key=lambda node: (node.since, node.id)):
        if node.phase is NodePhase.PENDING and not node.block:
            pending.setdefault(node.type, []).append(node)
    for kind, nodes in pending.items():
        known |= {node.id: block for node, block in zip(nodes, _on_the_way(fleet, kind), strict=False)}
    return known


def _on_the_way(fleet: Fleet, kind: str) -> list[SeenBlock]:
    """Blocks of type ``kind`` whose node has not joined."""
    joined = {node.block for node in fleet.nodes.values() if node.block}
    coming = [
        block
        for block in fleet.blocks.values()
        if block.type == kind
        and not block.phase.ended
        and block.phase is not BlockPhase.CANCELLING
        and block.name not in joined
    ]
    return sorted(coming, key=lambda block: (block.phase.queued, block.asked_at, block.name))


def next_node(fleet: Fleet, need: Need, now: float) -> Expected | None:
    """The node that is expected first, of those asked for that could hold ``need``; ``None``: none was asked for.

    (1) a block is on its way; (2) one can be submitted; (3) none can before one ends that was told to: it holds its
    place for as long as the scheduler has its job, which may hang there, and nobody says for how long.
    """
    able = {kind.name for kind in fleet.policy.kinds if holds(kind, need)}
    asked = {node.type for node in fleet.nodes.values() if node.phase is NodePhase.PENDING and node.type in able}
    coming = [_expect(fleet, block, now) for kind in sorted(asked) for block in _on_the_way(fleet, kind)]
    if coming:  # (1)
        return min(coming, key=lambda one: (one.in_s is None, one.in_s or 0.0))
    blocked = {kind: block for kind in sorted(asked) if (block := _in_the_way(fleet, kind)) is not None}
    for kind in sorted(asked - blocked.keys()):  # (2)
        return Expected(ask_s(fleet, kind), f"a job for a {kind} node is about to be submitted")
    for kind, block in blocked.items():  # (3)
        job = "" if block.job is None else f" (job {block.job})"
        return Expected(None, f"a job for a {kind} node waits for {block.name}{job} to end")
    return None


def _in_the_way(fleet: Fleet, kind: str) -> SeenBlock | None:
    """Of a type that has as many blocks as it may, the first that is being cancelled."""
    most = next((each.max_nodes for each in fleet.policy.kinds if each.name == kind), 0)
    holding = [block for block in fleet.blocks.values() if block.type == kind and not block.phase.ended]
    leaving = [block for block in holding if block.phase is BlockPhase.CANCELLING]
    return min(leaving, key=lambda b: (b.asked_at, b.name), default=None) if len(holding) >= most else None


def ask_s(fleet: Fleet, kind: str) -> float | None:
    """Seconds until a node of type ``kind``, asked for now, could take an engine, going by the queue lately."""
    wait_s = fleet.queue_wait_s.get(kind)
    return None if wait_s is None else wait_s + start_s(fleet, kind)


def why_none(fleet: Fleet, need: Need, now: float, *, detail: bool = False) -> str | None:
    """Why no node that could hold ``need`` was asked for, if the last one asked for could not be had.

    ``detail``: for administrators, with what the agent that could not be made, or its Ray, said.
    """
    for kind in fleet.policy.kinds:
        trouble = fleet.troubles.get(kind.name)
        failure = trouble or fleet.kind_failures.get(kind.name)
        if failure is not None and holds(kind, need):
            again = f", tried again in {failure.retry_at - now:.0f} s" if now < failure.retry_at else ""
            said = f": {failure.reason.rstrip('.')}" if detail or trouble is not None else ""
            return f"no {kind.name} node can be had{said}{again}"
    return None


def _expect(fleet: Fleet, block: SeenBlock, now: float) -> Expected:
    """(1) its job runs, its node is on its way; (2) it is not submitted yet; (3) the scheduler says when it starts;
    (4) it does not."""
    job = "a job" if block.job is None else f"job {block.job}"
    start = start_s(fleet, block.type)
    if not block.phase.queued:  # (1)
        left = max(1.0, start if block.starts_at is None else block.starts_at + start - now)
        where = f" on {block.host}" if block.host else ""
        return Expected(left, f"{job} has started{where}, its node is expected to join in {left:.0f} s")
    wait_s = fleet.queue_wait_s.get(block.type)
    seen = None if wait_s is None else max(0.0, block.asked_at + wait_s - now) + start
    if block.phase is BlockPhase.SUBMITTING:  # (2)
        said = f": {block.reason}" if block.reason else ""
        return Expected(seen, f"a job for a {block.type} node is being submitted{said}")
    words = f"{job} waits: {block.reason}" if block.reason else f"{job} waits in the queue"
    if block.starts_at is not None:  # (3)
        starts_in = max(0.0, block.starts_at - now)
        return Expected(starts_in + start, f"{words}, expected to start in {starts_in:.0f} s")
    return Expected(seen, words)  # (4)


# --- what can be told ---
def model_state(fleet: Fleet, model: str) -> str:
    """``ready``, ``stalled``, ``loading``, ``failed``, ``queued``, ``draining`` or ``cold``: the first that is true.

    ``stalled``: its engines have work and make no progress. ``queued``: it is wanted, and waits for room or for a node.
    """
    engines = [fleet.engines[engine] for engine in fleet.model_engines.get(model, ())]
    up = [engine for engine in engines if engine.state is EngineState.READY and engine.route is RouteState.OPEN]
    if up:
        return "stalled" if all(map(stalled, up)) else "ready"
    if any(live(engine) for engine in engines):
        return "loading"
    if model in fleet.failures:
        return "failed"
    if model in fleet.queues or model in fleet.pinned or model in fleet.wished:
        return "queued"
    return "draining" if engines else "cold"


def eta_s(fleet: Fleet, model: str, now: float) -> float | None:
    """Expected seconds until ``model`` serves, if it were wanted now; ``None``: nobody knows.

    (1) it serves: 0; (2) it loads: what is left of its last load's time, at least 1; (3) back-off: its rest and a load;
    (4) there is free room: a load, after what loads or stops there now; (5) a node that could hold it was asked for:
    when that is expected, and a load; (6) a node here could hold it: a load; (7) a node must be had first: as long as
    the queue took lately, and a load.
    """
    engines = [fleet.engines[engine] for engine in fleet.model_engines.get(model, ())]
    if any(serving(engine) for engine in engines):  # (1)
        return 0.0
    load = fleet.load_s.get(model, fleet.policy.load_guess_s)
    loading = [engine for engine in engines if live(engine)]
    if loading:  # (2)
        return max(1.0, load - (now - min(engine.started for engine in loading)))
    failure = fleet.failures.get(model)
    if failure is not None and now < failure.retry_at:  # (3)
        return failure.retry_at - now + load
    entry = fleet.models.get(model)
    if entry is None:
        return None
    need = need_of(entry)
    here = [node for node in fleet.nodes.values() if stays(node) and holds(node, need)]
    if any(Room(node.free_host_mib, node.free_gpu_mib).devices(need) is not None for node in here):  # (4)
        other = waits_for(fleet, need)
        return load if other is None else wait_s(fleet, other, now) + load
    coming = next_node(fleet, need, now)
    if coming is not None:  # (5)
        return None if coming.in_s is None else coming.in_s + load
    if here:  # (6)
        return load
    asks = [ask_s(fleet, kind.name) for kind in fleet.policy.kinds if kind.max_nodes > 0 and holds(kind, need)]
    return min((seconds + load for seconds in asks if seconds is not None), default=None)  # (7)


def waiting_reason(fleet: Fleet, model: str, now: float, *, detail: bool = False) -> str | None:
    """Why a model waits: (1) one that is ``queued``, for another engine on a GPU or for a node that it needs; (2) any,
    while the state folder cannot be written; else ``None``.

    ``detail``: for administrators.
    """
    entry = fleet.models.get(model)
    said: str | None = None
    if entry is not None and model_state(fleet, model) == "queued":  # (1)
        said = _queued_for(fleet, need_of(entry), now, detail=detail)
    return "; ".join(filter(None, (said, fleet.storage))) or None  # (2)


def _queued_for(fleet: Fleet, need: Need, now: float, *, detail: bool) -> str | None:
    other = waits_for(fleet, need)
    if other is not None:
        return wait_words(other)
    coming = next_node(fleet, need, now)
    return why_none(fleet, need, now, detail=detail) if coming is None else coming.words
