"""The working copy of one step: tables that are copied when first written, and the indexes kept beside them.

``step`` makes a ``Change`` from a frozen ``Fleet``, the rules write into it, ``commit`` freezes it again. Nothing of
the fleet it came from is altered, so a step stays a pure function. This is the only module that touches the indexes
(``Node.engines``, ``Node.free_*``, ``Fleet.queues``, ``Fleet.model_engines``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Generic, TypeVar

from gateway_plugin.catalog import Model
from serve.core.effects import Effect
from serve.core.events import FoundServer, SeenBlock
from serve.core.fleet import (
    Apart,
    ClosingRoute,
    Engine,
    EngineState,
    Failure,
    Fleet,
    Node,
    NodePhase,
    Trouble,
    Waiter,
)

Row = TypeVar("Row")
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


class Table(Generic[Row]):
    """A mapping that is copied at the first write."""

    __slots__ = ("_own", "rows")

    def __init__(self, rows: Mapping[str, Row]) -> None:
        self.rows: Mapping[str, Row] = rows
        self._own: dict[str, Row] | None = None

    def put(self, key: str, row: Row) -> None:
        if self._own is None:
            self.rows = self._own = dict(self.rows)
        self._own[key] = row

    def drop(self, key: str) -> None:
        """Forget ``key`` if it is there."""
        if key not in self.rows:
            return
        if self._own is None:
            self.rows = self._own = dict(self.rows)
        del self._own[key]


class Change:
    """A fleet while one event is worked in."""

    def __init__(self, fleet: Fleet, now: float) -> None:
        self._from = fleet
        self.now = now
        self.policy = fleet.policy
        self.effects: list[Effect] = []
        self.epoch = fleet.epoch
        self.models: Mapping[str, Model] = fleet.models
        self.names: Mapping[str, str] = fleet.names
        self.nodes: Table[Node] = Table(fleet.nodes)
        self.engines: Table[Engine] = Table(fleet.engines)
        self.waiters: Table[Waiter] = Table(fleet.waiters)
        self.queues: Table[tuple[str, ...]] = Table(fleet.queues)
        self.model_engines: Table[tuple[str, ...]] = Table(fleet.model_engines)
        self.slots: Table[int] = Table(fleet.slots)
        self.closing: Table[ClosingRoute] = Table(fleet.closing)
        self.failures: Table[Failure] = Table(fleet.failures)
        self.kind_failures: Table[Failure] = Table(fleet.kind_failures)
        self.load_s: Table[float] = Table(fleet.load_s)
        self.pinned = fleet.pinned
        self.wished: Table[float] = Table(fleet.wished)
        self.switches = fleet.switches
        self.serial = fleet.serial
        self.settled = fleet.settled
        self.unsettled = fleet.unsettled
        self.found: tuple[FoundServer, ...] = fleet.found
        self.started_at = fleet.started_at
        self.blocks: Mapping[str, SeenBlock] = fleet.blocks
        self.queue_wait_s: Mapping[str, float] = fleet.queue_wait_s
        self.block_start_s = Table(fleet.block_start_s)
        self.apart: Table[Apart] = Table(fleet.apart)
        self.troubles: Table[Trouble] = Table(fleet.troubles)
        self.forgiven: Table[float] = Table(fleet.forgiven)
        self.joined_blocks = fleet.joined_blocks
        self.storage = fleet.storage
        self.slots_changed = False
        self.fresh_slots: tuple[int, ...] = ()

    def commit(self) -> Fleet:
        return replace(
            self._from,
            epoch=self.epoch,
            models=self.models,
            names=self.names,
            nodes=self.nodes.rows,
            engines=self.engines.rows,
            waiters=self.waiters.rows,
            queues=self.queues.rows,
            model_engines=self.model_engines.rows,
            slots=self.slots.rows,
            closing=self.closing.rows,
            failures=self.failures.rows,
            kind_failures=self.kind_failures.rows,
            load_s=self.load_s.rows,
            pinned=self.pinned,
            wished=self.wished.rows,
            switches=self.switches,
            serial=self.serial,
            settled=self.settled,
            unsettled=self.unsettled,
            found=self.found,
            started_at=self.started_at,
            blocks=self.blocks,
            queue_wait_s=self.queue_wait_s,
            block_start_s=self.block_start_s.rows,
            apart=self.apart.rows,
            troubles=self.troubles.rows,
            forgiven=self.forgiven.rows,
            joined_blocks=self.joined_blocks,
            storage=self.storage,
        )

    def emit(self, effect: Effect) -> None:
        self.effects.append(effect)

    def next_serial(self) -> int:
        self.serial += 1
        return self.serial

    # --- engines ---

    def name(self, label: str, serial: int) -> str:
        """The id of a new thing: ``local-tp3xkb-1``. The epoch, seconds since 1970, stands in it to the base of 36:
        short, and in the order of time."""
        digits, left = "", self.epoch
        while left or not digits:
            left, digit = divmod(left, 36)
            digits = _DIGITS[digit] + digits
        return f"{label}-{digits}-{serial}"

    def engines_of(self, model: str) -> tuple[Engine, ...]:
        return tuple(self.engines.rows[engine] for engine in self.model_engines.rows.get(model, ()))

    def add_engine(self, engine: Engine) -> None:
        """A new engine: it holds its memory from now on."""
        self.engines.put(engine.id, engine)
        self.model_engines.put(engine.model, (*self.model_engines.rows.get(engine.model, ()), engine.id))
        node = self.nodes.rows[engine.node]
        self._hold(replace(node, engines=(*node.engines, engine.id), idle_since=None), engine, 1)

    def set_engine(self, engine: Engine, **fields: Any) -> Engine:
        """Change fields of an engine other than its id, model, node, devices and memory."""
        changed = replace(engine, **fields)
        self.engines.put(engine.id, changed)
        return changed

    def drop_engine(self, engine: Engine) -> None:
        """Its process is gone: its memory is free."""
        self.engines.drop(engine.id)
        left = tuple(other for other in self.model_engines.rows[engine.model] if other != engine.id)
        if left:
            self.model_engines.put(engine.model, left)
        else:
            self.model_engines.drop(engine.model)
        node = self.nodes.rows[engine.node]
        engines = tuple(other for other in node.engines if other != engine.id)
        self._hold(replace(node, engines=engines, idle_since=None if engines else self.now), engine, -1)

    def _hold(self, node: Node, engine: Engine, sign: int) -> None:
        host, gpus = node.free_host_mib, list(node.free_gpu_mib)
        if engine.gpus:
            for gpu in engine.gpus:
                if gpu < len(gpus):
                    gpus[gpu] -= sign * engine.memory_mib
        else:
            host -= sign * engine.memory_mib
        self.nodes.put(node.id, replace(node, free_host_mib=host, free_gpu_mib=tuple(gpus)))

    def describe_node(self, node: Node, host_mib: int, gpu_mib: tuple[int, ...]) -> None:
        """Put ``node`` with what it holds in all; its free memory follows from the engines on it."""
        node = replace(node, host_mib=host_mib, gpu_mib=gpu_mib, free_host_mib=host_mib, free_gpu_mib=gpu_mib)
        self.nodes.put(node.id, node)
        for engine in node.engines:
            self._hold(self.nodes.rows[node.id], self.engines.rows[engine], 1)

    def reachable(self, engine: Engine) -> bool:
        """Whether its agent can be told something."""
        return self.nodes.rows[engine.node].phase in (NodePhase.UP, NodePhase.LEAVING)

    # --- waiters ---
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

    def wanted(self, model: str) -> bool:
        """Somebody waits for it, it is pinned, or wished for: by an administrator, or by who was told to come back."""
        return model in self.pinned or model in self.wished.rows or self.attended(model) is not None

    def attended(self, model: str) -> Waiter | None:
        """The oldest waiter of ``model`` that has a client."""
        waiters = (self.waiters.rows[ticket] for ticket in self.queues.rows.get(model, ()))
        return next((waiter for waiter in waiters if not waiter.unattended), None)

    def unattended(self, model: str) -> bool:
        """It is to be loaded for clients that may come again, and nobody else wants it."""
        return model in self.queues.rows and not self.wanted(model)

    def load_time_s(self, model: str) -> float:
        """How long ``model`` takes to load, as far as is known."""
        return self.load_s.rows.get(model, self.policy.load_guess_s)


def live(engine: Engine) -> bool:
    """It serves its model or is going to."""
    return engine.state in (EngineState.LOADING, EngineState.READY)


def ready_at(engine: Engine) -> float:
    """When it became ready."""
    return engine.started + (engine.loaded_s or 0.0)
