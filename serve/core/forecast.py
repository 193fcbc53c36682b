"""Forecasts: the state of a model, the time until it serves, and the reason why it waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from gateway_plugin.phases import BlockPhase
from serve.core.events import SeenBlock
from serve.core.node_times import start_s
from serve.core.room import Need, holds, need_of, wait_s, wait_words, waits_for, with_room
from serve.core.state import (
    Engine,
    EngineState,
    Fleet,
    Node,
    NodePhase,
    RouteState,
    Weights,
    live,
    serving,
    sleeps,
    stalled,
    stays,
)
from serve.core.table import seen


class Expected(NamedTuple):
    """The first pending node that could hold a need."""

    in_s: float | None
    """Seconds until it can take an engine; ``None``: not known."""
    words: str
    """Why it is not there yet, as the scheduler reports it."""


class Forecast:
    """Forecasts for ``fleet`` at ``now``. The part that all models with one need share is computed once."""

    def __init__(self, fleet: Fleet, now: float) -> None:
        self.fleet = fleet
        self.now = now
        self._begins: dict[Need, float | None] = {}
        self._coming: dict[Need, Expected | None] = {}
        self._waits: dict[Need, Engine | None] = {}

    @cached_property
    def _pending(self) -> Mapping[str, list[Node]]:
        """Type -> requested nodes that have no block yet, oldest request first."""
        pending: dict[str, list[Node]] = {}
        nodes = [node for node in self.fleet.nodes.values() if node.phase is NodePhase.PENDING]
        for node in sorted(nodes, key=lambda node: (node.since, node.id)):
            pending.setdefault(node.type, []).append(node)
        return pending

    @cached_property
    def _on_the_way(self) -> Mapping[str, list[SeenBlock]]:
        """Type -> blocks whose node has not joined, running ones before queued ones, oldest request first."""
        joined = {node.block for node in self.fleet.nodes.values()}
        coming: dict[str, list[SeenBlock]] = {}
        for block in self.fleet.blocks.values():
            if block.name not in joined and not block.phase.ended and block.phase is not BlockPhase.CANCELLING:
                coming.setdefault(block.type, []).append(block)
        for blocks in coming.values():
            blocks.sort(key=lambda block: (block.phase.queued, block.asked_at, block.name))
        return coming

    def blocks_of(self) -> Mapping[str, SeenBlock]:
        """Node -> its block. Which block a pending node will join from is not known: they are matched in order."""
        blocks = self.fleet.blocks
        known = {node.id: blocks[node.block] for node in self.fleet.nodes.values() if node.block in blocks}
        for kind, nodes in self._pending.items():
            waiting = [node for node in nodes if not node.block]
            known |= {node.id: block for node, block in zip(waiting, self._on_the_way.get(kind, ()), strict=False)}
        return known

    def next_node(self, need: Need) -> Expected | None:
        """The pending node that is expected first, of those that could hold ``need``; ``None``: there is none.

        (1) a block is on its way; (2) one can be submitted; (3) none can before a cancelled one ends: it holds its
        place for as long as the scheduler has its job, which may hang there for an unknown time.
        """
        if need not in self._coming:
            self._coming[need] = self._next_node(need)
        return self._coming[need]

    def _next_node(self, need: Need) -> Expected | None:
        able = {kind.name for kind in self.fleet.policy.node_types if holds(kind, need)}
        asked = able & self._pending.keys()
        coming = [self._expect(block) for kind in sorted(asked) for block in self._on_the_way.get(kind, ())]
        if coming:  # (1)
            return min(coming, key=lambda one: (one.in_s is None, one.in_s or 0.0))
        blocked = {kind: block for kind in sorted(asked) if (block := _in_the_way(self.fleet, kind)) is not None}
        for kind in sorted(asked - blocked.keys()):  # (2)
            return Expected(_ask_s(self.fleet, kind), f"a job for a {kind} node is about to be submitted")
        for kind, block in blocked.items():  # (3)
            job = "" if block.job is None else f" (job {block.job})"
            return Expected(None, f"a job for a {kind} node waits for {block.name}{job} to end")
        return None

    def _waits_for(self, need: Need) -> Engine | None:
        if need not in self._waits:
            self._waits[need] = waits_for(self.fleet, need)
        return self._waits[need]

    def eta_s(self, model: str) -> float | None:
        """Expected seconds until ``model`` serves, if it were wanted now; ``None``: not known.

        (1) it serves: 0; (2) it loads or wakes: the rest of the last time that took, at least 1, or it sleeps on a node
        that stays: the time of a wake; (3) back-off: its rest and a load;
        else a load, after its weights are fetched where that must be, and (4) the loads and stops under way there,
        where there is free room; (5) the start of the pending node, where one could hold it; (6) nothing, where a node
        here could hold it; (7) the queue and start of a new node, which take as long as the last ones took.
        """
        fleet, now = self.fleet, self.now
        engines = [fleet.engines[engine] for engine in fleet.model_engines.get(model, ())]
        for engine in engines:  # (1)
            if serving(engine):
                return 0.0
        load = fleet.load_s.get(model, fleet.policy.load_guess_s)
        loading = [engine for engine in engines if live(engine)]
        if loading:  # (2)
            return min(
                wait_s(fleet, one, now) if one.state is EngineState.WAKING else max(1.0, load - (now - one.started))
                for one in loading
            )
        if any(engine.state is EngineState.ASLEEP and stays(fleet.nodes[engine.node]) for engine in engines):
            return fleet.wake_s.get(model, fleet.policy.wake_guess_s)
        failure = fleet.failures.get(model)
        if failure is not None and now < failure.retry_at:  # (3)
            return failure.retry_at - now + load
        entry = fleet.models.get(model)
        if entry is None:
            return None
        weights_s = fetched_in_s(fleet.weights.get(model), now)
        if weights_s is None:
            return None
        need = need_of(entry)
        if need not in self._begins:
            self._begins[need] = self._begins_in_s(need)
        begins = self._begins[need]
        return None if begins is None else weights_s + begins + load

    def _begins_in_s(self, need: Need) -> float | None:
        """Cases (4) to (7) of ``eta_s``: seconds until a load could begin."""
        fleet = self.fleet
        if any(map(stays, seen(fleet.nodes, with_room, need))):  # (4)
            other = self._waits_for(need)
            return 0.0 if other is None else wait_s(fleet, other, self.now)
        coming = self.next_node(need)
        if coming is not None:  # (5)
            return coming.in_s
        if any(stays(node) and holds(node, need) for node in fleet.nodes.values()):  # (6)
            return 0.0
        able = [kind for kind in fleet.policy.node_types if kind.max_nodes > 0 and holds(kind, need)]
        return min((s for kind in able if (s := _ask_s(fleet, kind.name)) is not None), default=None)  # (7)

    def waiting_reason(self, model: str, *, detail: bool = False) -> str | None:
        """Why a model waits: (1) a ``queued`` one, for another engine on a GPU or for a node that it needs; one whose
        weights are fetched, for these; (2) any, while the state folder cannot be written; else ``None``. ``detail``:
        for administrators."""
        entry = self.fleet.models.get(model)
        said: str | None = None
        state = model_state(self.fleet, model)
        if state == "fetching":
            said = fetch_words(self.fleet.weights[model])
        elif entry is not None and state == "queued":  # (1)
            need = need_of(entry)
            if (other := self._waits_for(need)) is not None:
                said = wait_words(other)
            elif (coming := self.next_node(need)) is not None:
                said = coming.words
            else:
                said = why_none(self.fleet, need, self.now, detail=detail)
        return "; ".join(filter(None, (said, self.fleet.storage))) or None  # (2)

    def _expect(self, block: SeenBlock) -> Expected:
        """(1) its job runs, its node is on its way; (2) it is not submitted yet; (3) the scheduler forecasts its start;
        (4) it does not."""
        job = "a job" if block.job is None else f"job {block.job}"
        start = start_s(self.fleet, block.type)
        if not block.phase.queued:  # (1)
            left = max(1.0, start if block.starts_at is None else block.starts_at + start - self.now)
            where = f" on {block.host}" if block.host else ""
            return Expected(left, f"{job} has started{where}, its node is expected to join in {left:.0f} s")
        wait_s = self.fleet.queue_wait_s.get(block.type)
        seen = None if wait_s is None else max(0.0, block.asked_at + wait_s - self.now) + start
        if block.phase is BlockPhase.SUBMITTING:  # (2)
            said = f": {block.reason}" if block.reason else ""
            return Expected(seen, f"a job for a {block.type} node is being submitted{said}")
        words = f"{job} waits: {block.reason}" if block.reason else f"{job} waits in the queue"
        if block.starts_at is not None:  # (3)
            starts_in = max(0.0, block.starts_at - self.now)
            return Expected(starts_in + start, f"{words}, expected to start in {starts_in:.0f} s")
        return Expected(seen, words)  # (4)


def model_state(fleet: Fleet, model: str, engines: Sequence[Engine] | None = None) -> str:
    """``ready``, ``stalled``, ``loading``, ``fetching``, ``failed``, ``queued``, ``asleep``, ``draining`` or ``cold``:
    the first that is true.

    ``stalled``: its engines have work and make no progress. ``queued``: it is wanted, and waits for room or for a node.
    ``fetching``: its weights are. ``failed``: also if they are not on disk, and nothing fetches them.
    ``asleep``: an engine of it sleeps, or falls asleep. One that wakes is ``loading``. ``engines``: all of its own.
    """
    if engines is None:
        engines = [fleet.engines[engine] for engine in fleet.model_engines.get(model, ())]
    up = [engine for engine in engines if engine.state is EngineState.READY and engine.route is RouteState.OPEN]
    if up:
        return "stalled" if all(map(stalled, up)) else "ready"
    if any(map(live, engines)):
        return "loading"
    weights = fleet.weights.get(model) if not engines else None
    if weights is not None and weights.fetching:
        return "fetching"
    if model in fleet.failures or (weights is not None and not weights.may_fetch):
        return "failed"
    if model in fleet.queues or model in fleet.pinned or model in fleet.requested_until:
        return "queued"
    if any(map(sleeps, engines)):
        return "asleep"
    return "draining" if engines else "cold"


def fetched_in_s(weights: Weights | None, now: float) -> float | None:
    """Seconds until weights are on disk, at the rate of late: 0 for those that are; ``None``: not known."""
    if weights is None:
        return 0.0
    if not weights.fetching or not weights.bytes_s or not weights.total_bytes:
        return None
    return max(0.0, (weights.total_bytes - weights.done_bytes) / weights.bytes_s - (now - weights.at))


def fetch_words(weights: Weights) -> str:
    """``its weights are being fetched: 3.2 of 14.9 GiB, 210 MiB/s``."""
    if not weights.total_bytes:
        return weights.reason
    rate = f", {weights.bytes_s / 2**20:.0f} MiB/s" if weights.bytes_s else ""
    unit, name = (2**30, "GiB") if weights.total_bytes >= 2**30 else (2**20, "MiB")
    return f"{weights.reason}: {weights.done_bytes / unit:.1f} of {weights.total_bytes / unit:.1f} {name}{rate}"


def models_before(fleet: Fleet, model: str) -> int:
    """How many models that wait for room have an older waiter with a client, by which placement orders them."""
    waits = {name: since for name in fleet.queues if (since := _oldest(fleet, name)) is not None}
    mine = waits.get(model)
    earlier = [name for name, since in waits.items() if mine is None or (since, name) < (mine, model)]
    return sum(name != model and model_state(fleet, name) == "queued" for name in earlier)


def _oldest(fleet: Fleet, model: str) -> float | None:
    waiters = (fleet.waiters[ticket] for ticket in fleet.queues[model])
    return next((waiter.since for waiter in waiters if not waiter.unattended), None)


def stall_words(fleet: Fleet, engine: Engine, now: float) -> str | None:
    """For all users: ``no progress for 40 s with 3 requests in flight; ended at 60 s``; ``None``: it makes progress."""
    model = fleet.models.get(engine.model)
    if engine.stalled_since is None or model is None:
        return None
    count = max(engine.in_flight, engine.stalled_with)
    requests = "1 request" if count == 1 else f"{count} requests"
    return (
        f"no progress for {max(0.0, now - engine.stalled_since):.0f} s with {requests} in flight; "
        f"ended at {model.hang_after_s:.0f} s"
    )


def _in_the_way(fleet: Fleet, kind: str) -> SeenBlock | None:
    """Of a type that is at its limit of blocks, the first that is being cancelled."""
    most = next((each.max_nodes for each in fleet.policy.node_types if each.name == kind), 0)
    holding = [block for block in fleet.blocks.values() if block.type == kind and not block.phase.ended]
    leaving = [block for block in holding if block.phase is BlockPhase.CANCELLING]
    return min(leaving, key=lambda b: (b.asked_at, b.name), default=None) if len(holding) >= most else None


def _ask_s(fleet: Fleet, kind: str) -> float | None:
    """Seconds until a node of type ``kind``, requested now, could take an engine, by the last queue times."""
    wait_s = fleet.queue_wait_s.get(kind)
    return None if wait_s is None else wait_s + start_s(fleet, kind)


def why_none(fleet: Fleet, need: Need, now: float, *, detail: bool = False) -> str | None:
    """Why no node that could hold ``need`` was requested, if the last request failed.

    ``detail``: for administrators, with the error of the agent that could not be created, or of Ray.
    """
    for kind in fleet.policy.node_types:
        backoff = fleet.backoffs.get(kind.name)
        failure = backoff or fleet.agent_failures.get(kind.name)
        if failure is not None and holds(kind, need):
            again = f", tried again in {failure.retry_at - now:.0f} s" if now < failure.retry_at else ""
            said = f": {failure.reason.rstrip('.')}" if detail or backoff is not None else ""
            return f"no {kind.name} node can be had{said}{again}"
    return None


def eta_s(fleet: Fleet, model: str, now: float) -> float | None:
    """``Forecast.eta_s`` of one model."""
    return Forecast(fleet, now).eta_s(model)


def waiting_reason(fleet: Fleet, model: str, now: float, *, detail: bool = False) -> str | None:
    """``Forecast.waiting_reason`` of one model."""
    return Forecast(fleet, now).waiting_reason(model, detail=detail)
