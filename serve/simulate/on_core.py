"""Pressure against possession on the core's own seam, ``serve.core.transaction.Policies``: an experiment, not in use
by the gateway.

The seam cannot express: which waiting model comes first (the core goes by the oldest waiter), that an engine's worth
depends on the requesting model, that several victims' worth adds up, and learned rates (kept here, beside the fleet, so
that a replay would have to begin at the beginning).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from serve.core import events as ev
from serve.core.effects import Effect
from serve.core.engine_use import idle
from serve.core.room import Need, Room, need_of, victims
from serve.core.state import Engine, EngineState, NodePhase, RouteState, live, ready_at
from serve.core.step import DEFAULT
from serve.core.transaction import Transaction
from serve.simulate.deciders import Core
from serve.simulate.habits import Habits, Numbers


@dataclass
class _Verdict:
    """Of one step: the models that may take others' room, and up to which worth."""

    tx: Transaction
    allowed: set[str] = field(default_factory=set)
    limit: float = 0.0
    any_overdue: bool = False


class PressedCore(Core):
    """The gateway's controller with ``wanted_replicas``, ``evictable`` and ``eviction_rank`` by pressure."""

    def __init__(self, numbers: Numbers | None = None) -> None:
        self.numbers = numbers or Numbers()
        self.habits = Habits(self.numbers)
        self._verdict: _Verdict | None = None
        super().__init__(
            policies=replace(
                DEFAULT, wanted_replicas=self._replicas, evictable=self._evictable, eviction_rank=self._loss
            )
        )

    def tell(self, event: ev.Event, now: float) -> tuple[Effect, ...]:
        if isinstance(event, ev.Acquire) and not event.not_routed:
            self.habits.asked(event.model, now)
        elif isinstance(event, ev.EdgeSeen):
            for seen in event.servers:
                engine = self.fleet.engines.get(seen.engine)
                if engine is not None:
                    self.habits.used(engine.model, seen.last_used, ready_at(engine), now)
        return super().tell(event, now)

    # --- the seam ---
    def _replicas(self, tx: Transaction, model: str) -> int:
        """None for a model that would need others' room and does not weigh enough yet."""
        wanted = DEFAULT.wanted_replicas(tx, model)
        if not wanted or any(live(engine) for engine in tx.engines_of(model)):
            return wanted
        if _fits(tx, _freed(tx), need_of(tx.models[model])):
            return wanted
        return int(model in self._judge(tx).allowed)

    def _evictable(self, tx: Transaction, engine: Engine) -> bool:
        verdict = self._judge(tx)
        return self._may_go(tx, engine, verdict.any_overdue) and self._loss(tx, engine) <= verdict.limit

    def _loss(self, tx: Transaction, engine: Engine) -> float:
        load_s = tx.load_time_s(engine.model)
        likely = self.habits.likely(engine.model, 2 * load_s, tx.now) if idle(tx, engine) else 1.0
        return self.numbers.loss(likely, self.habits.rate(engine.model, tx.now), load_s)

    def _may_go(self, tx: Transaction, engine: Engine, any_overdue: bool) -> bool:
        if engine.state is not EngineState.READY or engine.route is not RouteState.OPEN or tx.wanted(engine.model):
            return False
        if any(tx.nodes.rows[part.node].phase is not NodePhase.UP for part in engine.parts):
            return False
        if idle(tx, engine) or any_overdue:
            return True
        return tx.now >= ready_at(engine) + self.numbers.quantum * tx.load_time_s(engine.model)

    # --- judgement ---
    def _judge(self, tx: Transaction) -> _Verdict:
        """Of all waiting models without a place, the heaviest first: it may go ahead if it weighs as much as the
        engines of one node without which it fits; those are no longer there for the next."""
        if self._verdict is not None and self._verdict.tx is tx:
            return self._verdict
        verdict = self._verdict = _Verdict(tx)
        freed = _freed(tx)
        waiting = []
        for model in tx.queues.rows:
            if any(live(engine) for engine in tx.engines_of(model)) or model not in tx.models:
                continue
            ages_s = [tx.now - tx.waiters.rows[ticket].since for ticket in tx.queues.rows[model]]
            load_s = tx.load_time_s(model)
            weight = self.numbers.pressure(ages_s, load_s)
            waiting.append((not self.numbers.overdue(ages_s[0], load_s), -weight, model))
        waiting.sort()
        verdict.any_overdue = any(not patient for patient, _, _ in waiting)
        going: set[str] = set()
        for patient, weight, model in waiting:
            need = need_of(tx.models[model])
            if _fits(tx, freed, need):
                continue
            found = self._cheapest(tx, freed, need, going, not patient)
            if found is None or (patient and -weight < self.numbers.hysteresis * found[0]):
                continue
            going |= {engine.id for engine in found[1]}
            verdict.allowed.add(model)
            worth = max(self._loss(tx, engine) for engine in found[1])
            verdict.limit = max(verdict.limit, worth)
        return verdict

    def _cheapest(
        self, tx: Transaction, freed: Mapping[str, Room], need: Need, going: set[str], overdue: bool
    ) -> tuple[float, Sequence[Engine]] | None:
        best: tuple[float, Sequence[Engine]] | None = None
        for node in tx.nodes.rows.values():
            if node.phase is not NodePhase.UP:
                continue
            there = [tx.engines.rows[one] for one in node.engines if one not in going]
            able = [engine for engine in there if self._may_go(tx, engine, overdue)]
            able.sort(key=lambda engine: (self._loss(tx, engine), engine.id))
            chosen = victims(able, node.id, freed[node.id], need)
            if chosen:
                worth = sum(self._loss(tx, engine) for engine in chosen)
                if worth < (math.inf if best is None else best[0]):
                    best = (worth, chosen)
        return best


def _freed(tx: Transaction) -> dict[str, Room]:
    """Node -> its free room once all that drains or stops is gone."""
    rooms = {node.id: Room(node.free_host_mib, node.free_gpu_mib) for node in tx.nodes.rows.values()}
    for engine in tx.engines.rows.values():
        if engine.state in (EngineState.DRAINING, EngineState.STOPPING):
            for part in engine.parts:
                rooms[part.node] = rooms[part.node].without(engine, part.node)
    return rooms


def _fits(tx: Transaction, freed: Mapping[str, Room], need: Need) -> bool:
    nodes = tx.nodes.rows
    return any(nodes[node].phase is NodePhase.UP and room.devices(need) is not None for node, room in freed.items())
