"""The working copy of one step: tables that are copied when first written, and the indexes kept beside them.

``step`` makes a ``Transaction`` from a frozen ``Fleet``, handlers and policies write into it, ``commit`` freezes it
again. The fleet it came from is not altered, so a step stays a pure function. Only this module writes the indexes
(``Node.engines``, ``Node.free_*``, ``Fleet.queues``, ``Fleet.model_engines``, ``Fleet.moving``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_origin, get_type_hints

from gateway_plugin.catalog import Model
from serve.core.callers import Asked, Caller, Next
from serve.core.effects import Effect
from serve.core.events import FoundServer, Part, SeenBlock
from serve.core.frozen import replace
from serve.core.habits import Habit, noted
from serve.core.policy import Policy
from serve.core.spread import Spread
from serve.core.state import (
    DECISIONS_MAX,
    Action,
    Apart,
    ClosingRoute,
    Decision,
    Engine,
    EngineState,
    Failure,
    Fleet,
    Node,
    NodePhase,
    NodeTypeBackoff,
    RouteState,
    Waiter,
    Weighed,
    Weights,
    live,
    reservation,
)
from serve.core.table import Table

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Policies:
    """The decisions that can be exchanged, each a function of the transaction. ``serve.core.step.DEFAULT`` has the
    gateway's own; ``dataclasses.replace(DEFAULT, scaling=...)`` makes others, e.g. for a simulation."""

    wanted_replicas: Callable[[Transaction, str], int]
    """How many engines a model should have."""
    placement: Callable[[Transaction, tuple[str, ...]], tuple[str, ...]]
    """Starts, waits or evicts for every model with a deficit; given the models that need a replacement because their
    node ends, returns the models that found no room, in order."""
    order: Callable[[Transaction], list[str]]
    """The models that are wanted, the one that is served first first."""
    candidates: Callable[[Transaction, str], Sequence[tuple[float, Engine]]]
    """The engines that may be evicted for a model and what each is worth, the cheapest first."""
    limit: Callable[[Transaction, str], float]
    """The most that may be evicted for a model, in the unit of ``candidates``."""
    summed: bool
    """Several victims are worth the sum of all; ``False``: as much as the most valuable one."""
    price: Callable[[Transaction, Sequence[Engine], float], float]
    """What of the worth of several victims counts against the limit."""
    held_s: Callable[[Transaction, Engine], float]
    """Seconds until a ready engine may go for another model."""
    sleep_worth: Callable[[Transaction, Engine], float]
    """Of the engines that sleep on a node the least worth goes first where another one needs their host memory."""
    blocked_s: Callable[[Transaction, Engine, str], float]
    """Seconds of waiting that a load of a model causes to an engine that sleeps on the same GPUs."""
    because: Callable[[Transaction, str, float], str]
    """The clause that tells why so much is evicted for a model, or (more than its limit) why it is not."""
    scaling: Callable[[Transaction, tuple[str, ...]], None]
    """Asks for nodes and releases nodes; given the models without room, in order."""


class Transaction:
    """A fleet during one event: every field of ``Fleet``, those listed here as ``Table``."""

    nodes: Table[Node]
    engines: Table[Engine]
    waiters: Table[Waiter]
    queues: Table[tuple[str, ...]]
    model_engines: Table[tuple[str, ...]]
    moving: Table[EngineState]
    slots: Table[int]
    closing: Table[ClosingRoute]
    failures: Table[Failure]
    agent_failures: Table[Failure]
    weights: Table[Weights]
    load_s: Table[float]
    wake_s: Table[float]
    sleep_doubts: Table[int]
    spreads: Table[Spread]
    drain_s: Table[float]
    habits: Table[Habit]
    callers: Table[Caller]
    asked: Table[Asked]
    follows: Table[Next]
    room_for: Table[float]
    weighed: Table[Weighed]
    requested_until: Table[float]
    block_start_s: Table[tuple[tuple[str, float], ...]]
    apart: Table[Apart]
    backoffs: Table[NodeTypeBackoff]
    reset_at: Table[float]

    policy: Policy
    epoch: int
    models: Mapping[str, Model]
    names: Mapping[str, str]
    pinned: frozenset[str]
    switches: int
    decisions: tuple[Decision, ...]
    serial: int
    settled: bool
    unsettled: frozenset[str]
    found: tuple[FoundServer, ...]
    started_at: float
    blocks: Mapping[str, SeenBlock]
    queue_wait_s: Mapping[str, float]
    joined_blocks: frozenset[str]
    storage: str

    def __init__(self, fleet: Fleet, now: float, policies: Policies) -> None:
        self.now = now
        self.policies = policies
        self.effects: list[Effect] = []
        self.slots_changed = False
        self.fresh_slots: tuple[int, ...] = ()
        self._before = fleet
        self.memo: dict[Any, Any] = {}
        """What policies have computed in this step; not part of the fleet."""
        self.__dict__.update(fleet.__dict__)
        for name in _TABLES:
            self.__dict__[name] = Table(getattr(fleet, name))

    def commit(self) -> Fleet:
        """The present fleet."""
        own = self.__dict__
        values = {name: own[name].rows if name in _TABLES else own[name] for name in _FIELDS}
        return replace(self._before, **values)

    def emit(self, effect: Effect) -> None:
        self.effects.append(effect)

    def decide(self, action: Action, model: str, because: str, *, engine: str = "", other: str = "") -> None:
        """Record a decision with its reason, unless the model's last one was the same."""
        last = next((one for one in reversed(self.decisions) if one.model == model), None)
        if last is None or (last.action, last.engine, last.other) != (action, engine, other):
            made = Decision(self.now, action, model, because, engine, other)
            self.decisions = (*self.decisions[1 - DECISIONS_MAX :], made)

    def next_serial(self) -> int:
        self.serial += 1
        return self.serial

    # --- engines ---

    def name(self, label: str, serial: int) -> str:
        """A new id: ``local-tp3xkb-1``. The epoch, seconds since 1970, is in it to the base of 36: short, and in the
        order of time."""
        digits, left = "", self.epoch
        while left or not digits:
            left, digit = divmod(left, 36)
            digits = _DIGITS[digit] + digits
        return f"{label}-{digits}-{serial}"

    def engines_of(self, model: str) -> tuple[Engine, ...]:
        return tuple(self.engines.rows[engine] for engine in self.model_engines.rows.get(model, ()))

    def nodes_of(self, engine: Engine) -> list[Node]:
        """Those of its parts, the head's first."""
        return [self.nodes.rows[part.node] for part in engine.parts]

    def add_engine(self, engine: Engine) -> None:
        """A new engine: it holds its ``reservation`` from now on."""
        self._put(engine)
        self.model_engines.put(engine.model, (*self.model_engines.rows.get(engine.model, ()), engine.id))
        for node in dict.fromkeys(part.node for part in engine.parts):
            row = self.nodes.rows[node]
            self.nodes.put(node, replace(row, engines=(*row.engines, engine.id), idle_since=None))
        self._hold(reservation(engine), 1)
        self._hold_asleep(engine, engine.sleep_mib)

    def set_engine(self, engine: Engine, **changes: Any) -> Engine:
        """Change fields of an engine other than its id, model and parts."""
        changed = replace(engine, **changes)
        self._put(changed)
        before, after = reservation(engine), reservation(changed)
        if before is not after:
            self._hold(before, -1)
            self._hold(after, 1)
        if changed.sleep_mib != engine.sleep_mib:
            self._hold_asleep(engine, changed.sleep_mib - engine.sleep_mib)
        return changed

    def drop_engine(self, engine: Engine) -> None:
        """Its process is gone: its memory is free."""
        self.engines.drop(engine.id)
        self.moving.drop(engine.id)
        left = tuple(other for other in self.model_engines.rows[engine.model] if other != engine.id)
        if left:
            self.model_engines.put(engine.model, left)
        else:
            self.model_engines.drop(engine.model)
        for node in dict.fromkeys(part.node for part in engine.parts):
            row = self.nodes.rows[node]
            engines = tuple(other for other in row.engines if other != engine.id)
            self.nodes.put(node, replace(row, engines=engines, idle_since=self.now))
        self._hold(reservation(engine), -1)
        self._hold_asleep(engine, -engine.sleep_mib)

    def _put(self, engine: Engine) -> None:
        self.engines.put(engine.id, engine)
        serves = engine.state is EngineState.READY and engine.route is RouteState.OPEN
        if serves or engine.state is EngineState.ASLEEP:
            self.moving.drop(engine.id)
        elif self.moving.rows.get(engine.id) is not engine.state:
            self.moving.put(engine.id, engine.state)

    def _hold(self, parts: Iterable[Part], sign: int) -> None:
        for part in parts:
            node = self.nodes.rows[part.node]
            host, gpus = node.free_host_mib, list(node.free_gpu_mib)
            for gpu in part.gpus:
                if gpu < len(gpus):
                    gpus[gpu] -= sign * part.mib
            if not part.gpus:
                host -= sign * part.mib
            self.nodes.put(node.id, replace(node, free_host_mib=host, free_gpu_mib=tuple(gpus)))

    def _hold_asleep(self, engine: Engine, mib: int) -> None:
        if mib:
            node = self.nodes.rows[engine.node]
            self.nodes.put(node.id, replace(node, free_sleep_mib=node.free_sleep_mib - mib))

    def describe_node(self, node: Node, host_mib: int, gpu_mib: tuple[int, ...], sleep_mib: int = 0) -> None:
        """Put ``node`` with its total memory; its free memory follows from the engines on it."""
        node = replace(
            node,
            host_mib=host_mib, gpu_mib=gpu_mib, sleep_mib=sleep_mib,
            free_host_mib=host_mib, free_gpu_mib=gpu_mib, free_sleep_mib=sleep_mib,
        )  # fmt: skip
        self.nodes.put(node.id, node)
        for engine in [self.engines.rows[name] for name in node.engines]:
            self._hold([part for part in reservation(engine) if part.node == node.id], 1)
            if engine.node == node.id:
                self._hold_asleep(engine, engine.sleep_mib)

    def reachable(self, engine: Engine) -> bool:
        """Whether its head's agent takes commands."""
        return self.nodes.rows[engine.node].phase in (NodePhase.UP, NodePhase.LEAVING)

    def ending(self, engine: Engine) -> bool:
        """Whether the end of one of its nodes is near."""
        return any(node.ending for node in self.nodes_of(engine))

    # --- waiters and demand ---
    def add_waiter(self, waiter: Waiter) -> None:
        self.waiters.put(waiter.ticket, waiter)
        self.queues.put(waiter.model, (*self.queues.rows.get(waiter.model, ()), waiter.ticket))

    def drop_waiter(self, ticket: str) -> None:
        waiter = self.waiters.rows[ticket]
        self.waiters.drop(ticket)
        left = tuple(other for other in self.queues.rows[waiter.model] if other != ticket)
        if left:
            self.queues.put(waiter.model, left)
        else:
            self.queues.drop(waiter.model)

    def waiting(self, model: str) -> list[Waiter]:
        """The waiters of ``model``, oldest first."""
        return [self.waiters.rows[ticket] for ticket in self.queues.rows.get(model, ())]

    def wanted(self, model: str) -> bool:
        """There is demand: a client waits, it is pinned, it is to be loaded, or a client is expected back."""
        if model in self.pinned or model in self.requested_until.rows:
            return True
        return model in self.queues.rows and self.attended(model) is not None

    def attended(self, model: str) -> Waiter | None:
        """The oldest waiter of ``model`` that has a client."""
        queue = self.queues.rows.get(model)
        if queue is None:
            return None
        waiters = (self.waiters.rows[ticket] for ticket in queue)
        return next((waiter for waiter in waiters if not waiter.unattended), None)

    def unattended(self, model: str) -> bool:
        """Only clients that did not wait have requested it: it is loaded in case they come again."""
        return model in self.queues.rows and not self.wanted(model)

    def deficit(self, model: str, *, replaced: bool = False) -> int:
        """How many engines ``model`` lacks. ``replaced``: those on nodes that end do not count, and at least one is
        needed; but with them there is never more than one above ``replicas_max``, so several on one node are replaced
        one after the other. Without weights on disk none is lacked, unless it has engines all the same."""
        if model in self.weights.rows and model not in self.model_engines.rows:
            return 0
        engines = [engine for engine in self.engines_of(model) if live(engine)]
        wanted = self.policies.wanted_replicas(self, model)
        if not replaced:
            return wanted - len(engines)
        staying = sum(not self.ending(engine) for engine in engines)
        most = self.models[model].replicas_max + 1 - len(engines)
        return min(max(wanted, 1) - staying, max(most, 1 - staying))

    def wake_time_s(self, model: str) -> float:
        """Seconds that an engine of ``model`` takes to wake, as far as is known."""
        return self.wake_s.rows.get(model, self.policy.wake_guess_s)

    @property
    def fleet_changed(self) -> bool:
        """Whether this step has changed an engine or a node."""
        return self.engines.rows is not self._before.engines or self.nodes.rows is not self._before.nodes

    def note_use(self, model: str, at: float, *, paused: bool) -> None:
        """``model`` was used at ``at``; ``paused``: nothing had been in flight since its last use."""
        self.habits.put(model, noted(self.habits.rows.get(model), at, paused=paused))

    def load_time_s(self, model: str) -> float:
        """Seconds that ``model`` takes to load, as far as is known."""
        return self.load_s.rows.get(model, self.policy.load_guess_s)


_FIELDS = tuple(field.name for field in fields(Fleet))
_TABLES = frozenset(name for name, kind in get_type_hints(Transaction).items() if get_origin(kind) is Table)
