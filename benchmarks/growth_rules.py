"""Other rules for how many nodes to ask for: values of ``serve.core.transaction.Policies.scaling``.

Each is a model of what its source does, with the source's own default numbers, given the same view of the world (the
working copy of a step and the wanted models that found no room) and the same means: ask for a node, cancel a pending
one, drain one that is up. Where a source leaves something open, the reading that favours it was taken, and is said.
"""

from __future__ import annotations

import math

from benchmarks.growth_trace import NODE
from serve.core.effects import CreateAgent, KillAgent
from serve.core.room import Room, need_of
from serve.core.state import Node, NodePhase
from serve.core.transaction import Transaction
from serve.core.transitions import drain_node


def ask(tx: Transaction, how_many: int = 1) -> None:
    """Submit jobs, up to the site's ``max_nodes``."""
    for _ in range(min(how_many, NODE.max_nodes - len(tx.nodes.rows))):
        name = f"{NODE.name}-{tx.epoch}-{tx.next_serial()}"
        tx.nodes.put(name, Node(name, NODE.name, NodePhase.PENDING, since=tx.now))
        tx.emit(CreateAgent(name, NODE.name))


def release(tx: Transaction, node: Node) -> None:
    """Give a node back: its routes are drained first, for every rule."""
    if node.phase is NodePhase.PENDING or not node.engines:
        tx.nodes.drop(node.id)
        tx.emit(KillAgent(node.id))
    else:
        drain_node(tx, node)


def finish_leaving(tx: Transaction) -> None:
    """Nodes that were drained and are empty go."""
    for node in list(tx.nodes.rows.values()):
        if node.drain_asked and not node.engines:
            tx.nodes.drop(node.id)
            tx.emit(KillAgent(node.id))


def release_idle(tx: Transaction, idle_s: float) -> None:
    """Give back every node that has held nothing for ``idle_s``."""
    for node in list(tx.nodes.rows.values()):
        if node.phase is NodePhase.UP and node.idle_since is not None and tx.now >= node.idle_since + idle_s:
            release(tx, node)


def unmet(tx: Transaction, unplaced: tuple[str, ...]) -> int:
    """Nodes that ``unplaced`` need beyond those that are pending: what is on its way is credited."""
    rooms = [Room(NODE.host_mib, NODE.gpu_mib) for node in tx.nodes.rows.values() if node.phase is NodePhase.PENDING]
    more = 0
    for name in unplaced:
        need = need_of(tx.models[name])
        place = next((index for index, room in enumerate(rooms) if room.devices(need) is not None), None)
        if place is None:
            rooms.append(Room(NODE.host_mib, NODE.gpu_mib))
            place, more = len(rooms) - 1, more + 1
        devices = rooms[place].devices(need)
        assert devices is not None, "an empty node holds every model"
        rooms[place] = rooms[place].add(devices, -need.mib)
    return more


class ParslSimple:
    """Parsl's ``simple`` strategy (``parsl/jobs/strategy.py``, ``_general_strategy``), every ``strategy_period`` 5 s.

    Tasks that are outstanding: one for each GPU of a model that is waited for or has requests in flight; slots: one for
    each GPU of a block, running or pending (the usual ``available_accelerators``). A model that is loaded and idle is
    not counted as a task, in its favour: otherwise nothing would be scaled in before keep-alive.
    (1) no task for ``max_idletime`` 120 s: every block goes; (2) fewer slots than tasks (``parallelism`` 1): ask for
    the difference; else nothing: "this strategy does not support scaling in".
    """

    period_s, max_idle_s = 5.0, 120.0

    def __init__(self) -> None:
        self.next_at = 0.0
        self.idle_since: float | None = None

    def __call__(self, tx: Transaction, unplaced: tuple[str, ...]) -> None:
        finish_leaving(tx)
        if tx.now < self.next_at:
            return
        self.next_at = tx.now + self.period_s
        busy = {engine.model for engine in tx.engines.rows.values() if engine.in_flight}
        tasks = sum(need_of(tx.models[model]).gpus for model in busy | set(tx.queues.rows))
        blocks = [node for node in tx.nodes.rows.values() if not node.drain_asked]
        slots = len(blocks) * len(NODE.gpu_mib)
        if tasks:
            self.idle_since = None
            if slots < tasks:  # (2)
                ask(tx, math.ceil((tasks - slots) / len(NODE.gpu_mib)))
        elif blocks:  # (1)
            self.idle_since = tx.now if self.idle_since is None else self.idle_since
            if tx.now - self.idle_since > self.max_idle_s:
                for node in blocks:
                    release(tx, node)


class OneAMinute:
    """One more job each minute while anything waits for room, whatever is in the queue already.

    As people's own scripts around Slurm do, and BioEngine's Slurm workers did with their scale-up cooldown of a minute
    before they waited for the job they had submitted last. Gives back what has been empty for five minutes.
    """

    every_s, idle_s = 60.0, 300.0

    def __init__(self) -> None:
        self.next_at = 0.0

    def __call__(self, tx: Transaction, unplaced: tuple[str, ...]) -> None:
        finish_leaving(tx)
        if unplaced and tx.now >= self.next_at:
            self.next_at = tx.now + self.every_s
            ask(tx)
        release_idle(tx, self.idle_s)


class UpOnly:
    """Asks for what is needed, crediting what is pending, and gives nothing back (SAIA; many a prototype)."""

    def __call__(self, tx: Transaction, unplaced: tuple[str, ...]) -> None:
        finish_leaving(tx)
        ask(tx, unmet(tx, unplaced))


class RayDefault:
    """Ray's autoscaler v2 as it comes (``ray/autoscaler/v2``): ``idle_timeout_minutes`` 5, ``upscaling_speed`` 1.

    Every 5 s (``AUTOSCALER_UPDATE_INTERVAL_S``) it packs what is pending onto nodes that are there or launching, and
    launches what is missing, at most ``max(1, running)`` at a time; a node idle for five minutes ends; a pending one
    is not cancelled (``RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S`` is off). What is pending: models without room,
    from the first moment.
    """

    period_s, idle_s = 5.0, 300.0

    def __init__(self) -> None:
        self.next_at = 0.0

    def __call__(self, tx: Transaction, unplaced: tuple[str, ...]) -> None:
        finish_leaving(tx)
        if tx.now < self.next_at:
            return
        self.next_at = tx.now + self.period_s
        running = sum(node.phase is NodePhase.UP for node in tx.nodes.rows.values())
        ask(tx, min(unmet(tx, unplaced), max(1, running)))
        release_idle(tx, self.idle_s)
