"""Placement of wanted models. Everything is decided afresh in every step, in the order of the oldest waiters.

``now`` is the free room of a node; ``later`` adds what drains or stops there. A model that waits for room to be freed
reserves its need in both: in ``later`` all of it, in ``now`` as much as is there. The models after it start where they
fit into the rest: so room goes to the longest waiter, and no room is freed twice.
On a GPU nothing starts while another engine loads or stops there (``serve.core.room``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import Enum, auto

from serve.core.effects import StartEngine
from serve.core.engine_use import drain_is_over, unclaimed
from serve.core.events import Part
from serve.core.node_times import takes
from serve.core.room import Need, Room, holds, need_of, unsettles, victims
from serve.core.sleep_room import first_sleep_mib
from serve.core.slots import free_slot, slots_in_use, take_slot
from serve.core.state import Engine, EngineState, Node, NodePhase, live, reservation, stays
from serve.core.transaction import Transaction
from serve.core.transitions import begin_stop, begin_wake, can_cancel_drain, cancel_drain


def wanted_order(tx: Transaction) -> list[str]:
    """Models that are wanted: those with waiters by their oldest, then other demand, last those without a waiting
    client; ties by name."""
    oldest = {model: tx.attended(model) for model in tx.queues.rows}
    queued = sorted((waiter.since, model) for model, waiter in oldest.items() if waiter is not None)
    unasked = sorted(model for model in tx.pinned | tx.requested_until.rows.keys() if oldest.get(model) is None)
    waiters = tx.waiters.rows
    last = sorted((waiters[tx.queues.rows[m][0]].since, m) for m in oldest if tx.unattended(m))
    order = (*(model for _, model in queued), *unasked, *(model for _, model in last))
    return [model for model in order if model in tx.models]


Where = Callable[[Node], bool]
"""Filter of nodes."""


class _When(Enum):
    AT_ONCE = auto()
    """There is free room, and nothing loads or stops on its GPUs."""
    ONCE_QUIET = auto()
    """There is free room, on GPUs where something loads or stops."""
    ONCE_FREED = auto()
    """There is room when what drains or stops is gone."""


class _Plan:
    """State of one pass: free room now, and later."""

    def __init__(self, tx: Transaction) -> None:
        self.tx = tx
        self.delta: dict[str, Room] = {}
        """Node -> room being freed there less reservations."""
        self.held: dict[str, Room] = {}
        """Node -> free room that is kept for models that wait for more to be freed there."""
        self.in_use = slots_in_use(tx)
        self.idle: dict[str, list[Engine]] | None = None
        """Node -> evictable engines, the first victim first; computed when first needed."""
        self.full: list[tuple[Need, float]] = []
        self.hopeless: list[tuple[Need, float]] = []
        """Needs and load times for which nodes that stay have no free room, and none even after evictions. Room only
        shrinks during the pass: an equal or larger need, with an equal or longer load, need not be tried again."""
        self.any_ends = any(node.ending for node in tx.nodes.rows.values())
        self.unsettled: dict[str, set[int]] = {}
        """Node -> GPUs where nothing may start: something loads or stops there, or a model waits for that to end."""
        for engine in [tx.engines.rows[name] for name in tx.moving.rows]:
            if engine.state is EngineState.READY:
                continue
            draining = engine.state is EngineState.DRAINING
            if unsettles(engine, due=draining and drain_is_over(tx, engine)):
                for node, gpu in engine.devices:
                    self.unsettled.setdefault(node, set()).add(gpu)
            if draining or engine.state in (EngineState.STOPPING, EngineState.FALLING_ASLEEP):
                self.free(engine)

    def knows(self, tried: list[tuple[Need, float]], model: str, need: Need) -> bool:
        """Whether an equal or smaller need found nothing."""
        load_s = self.tx.load_time_s(model)
        return any(load_s >= other_s and _no_less(need, other) for other, other_s in tried)

    def learn(self, tried: list[tuple[Need, float]], model: str, need: Need) -> None:
        tried.append((need, self.tx.load_time_s(model)))

    def reserve(self, node: Node, gpus: tuple[int, ...], mib: int) -> None:
        """Keep room for a model that cannot start yet."""
        now = self.now(node)
        held = self.held.get(node.id) or Room(0, (0,) * len(node.gpu_mib))
        for gpu in gpus:
            held = held.add((gpu,), min(mib, max(0, now.gpus[gpu])))
        if not gpus:
            held = held.add((), min(mib, max(0, now.host)))
        self.held[node.id] = held
        self.promise(node.id, gpus, -mib)

    def unsettle(self, node: Node, gpus: tuple[int, ...]) -> None:
        """Nothing else may start on these GPUs."""
        if gpus:
            self.unsettled.setdefault(node.id, set()).update(gpus)

    def promise(self, node: str, gpus: tuple[int, ...], mib: int) -> None:
        delta = self.delta.get(node) or Room(0, (0,) * len(self.tx.nodes.rows[node].gpu_mib))
        self.delta[node] = delta.add(gpus, mib)

    def free(self, engine: Engine, sign: int = 1) -> None:
        """The memory of ``engine`` is being freed; ``sign`` -1: it is kept after all."""
        for part in reservation(engine):
            self.promise(part.node, part.gpus, sign * part.mib)

    def now(self, node: Node) -> Room:
        held = self.held.get(node.id)
        if held is None:
            return Room(node.free_host_mib, node.free_gpu_mib)
        gpus = tuple(free - kept for free, kept in zip(node.free_gpu_mib, held.gpus, strict=True))
        return Room(node.free_host_mib - held.host, gpus)

    def later(self, node: Node) -> Room:
        delta = self.delta.get(node.id)
        if delta is None:
            return Room(node.free_host_mib, node.free_gpu_mib)
        gpus = tuple(free + more for free, more in zip(node.free_gpu_mib, delta.gpus, strict=True))
        return Room(node.free_host_mib + delta.host, gpus)

    def best(self, need: Need, where: Where, when: _When) -> tuple[Node, tuple[int, ...]] | None:
        """The node and devices with the fewest loads and stops on them, then of the tightest fit, ties by id; CPU
        models avoid nodes with GPUs if they can."""
        best: tuple[tuple[int, bool, int, str], Node, tuple[int, ...]] | None = None
        for node in self._nodes(need, when):
            free = max(node.free_gpu_mib, default=0) if need.gpus else node.free_host_mib
            if when is not _When.ONCE_FREED and free < need.mib:
                continue  # the fast path for a full node
            if not where(node):
                continue
            later = self.later(node)
            unsettled = self.unsettled.get(node.id, ())
            if when is _When.ONCE_FREED:
                devices = later.devices(need)
            else:
                devices = self.now(node).devices(need, within=later, last=unsettled)
            if devices is None:
                continue
            loads = 0 if when is _When.ONCE_FREED else sum(gpu in unsettled for gpu in devices)
            if when is _When.AT_ONCE and loads:
                continue
            left = later.host - need.mib if not devices else sum(later.gpus[gpu] - need.mib for gpu in devices)
            key = (loads, need.gpus == 0 and bool(node.gpu_mib), left, node.id)
            if best is None or key < best[0]:
                best = (key, node, devices)
        return None if best is None else best[1:]

    def _nodes(self, need: Need, when: _When) -> Iterable[Node]:
        nodes = self.tx.nodes.rows
        if when is _When.AT_ONCE:
            return nodes.values()
        if when is _When.ONCE_QUIET:
            return [nodes[node] for node in self.unsettled] if need.gpus else ()
        return [nodes[node] for node in self.delta]

    def rank(self, engine: Engine) -> float:
        return self.tx.policies.eviction_rank(self.tx, engine)

    def idle_engines(self) -> dict[str, list[Engine]]:
        """Node -> its evictable engines; nodes with the lowest ranks first."""
        if self.idle is None:
            tx = self.tx
            idle = [engine for engine in tx.engines.rows.values() if tx.policies.evictable(tx, engine)]
            self.idle = {}
            for engine in sorted(idle, key=lambda one: (self.rank(one), one.node, one.id)):
                for node in {part.node for part in engine.parts}:
                    self.idle.setdefault(node, []).append(engine)
        return self.idle

    def evict(self, engine: Engine, reason: str = "evicted") -> None:
        for node in {part.node for part in engine.parts}:
            self.idle_engines()[node].remove(engine)
        begin_stop(self.tx, engine, reason)
        self.free(engine)

    def cheapest(self, need: Need, where: Where, *, claimed: bool) -> tuple[Node, tuple[Engine, ...]] | None:
        """The node and its engines to evict: the set whose highest rank is lowest, then the smallest, ties by node.
        ``claimed``: none that waits for its first request."""
        tx = self.tx
        best: tuple[tuple[float, int, str], Node, tuple[Engine, ...]] | None = None
        for node_id, engines in self.idle_engines().items():
            if best is not None and engines and (self.rank(engines[0]), 1, node_id) > best[0]:
                break  # every set on this node and those after it costs more
            node = tx.nodes.rows[node_id]
            if not where(node) or not holds(node, need):
                continue
            candidates = [engine for engine in engines if not (claimed and unclaimed(tx, engine))]
            chosen = victims(candidates, node_id, self.later(node), need)
            if chosen:
                key = (max(map(self.rank, chosen)), len(chosen), node_id)
                if best is None or key < best[0]:
                    best = (key, node, chosen)
        return None if best is None else best[1:]


def place_wanted(tx: Transaction, handed_over: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Fill the deficit of every wanted model, then of those of ``handed_over``, whose engines are on nodes that end;
    returns those that found no room, in order.

    (1) it has as many engines, ready or loading, as it should (those to be handed over do not count): nothing to do;
    (2) its last load failed and its back-off is not over: not now;
    (3) its own engine drains, and no model that waits longer needs that room: cancel the drain;
    (4) no slot at the edge: wait for one, and free one if none is being freed;
    (5) it fits into free room, the tightest fit: start;
    (6) it fits into free room on GPUs where something loads or stops: wait for that; into room that is being freed:
        wait for it;
    (7) it fits once idle engines of one node are gone: evict the cheapest such set, unless it is only handed over
        (a model that no client waits for takes no room of one that was loaded and waits for its first request);
    (8) it has no engine, and (5) to (7) go on a node whose end is near but leaves it useful time;
    (9) no room.
    """
    plan: _Plan | None = None
    unplaced: list[str] = []
    wanted = wanted_order(tx)
    for name in (*wanted, *(model for model in handed_over if model not in wanted)):
        lacking = tx.deficit(name, replaced=name in handed_over)
        if lacking <= 0:  # (1)
            continue
        failure = tx.failures.rows.get(name)
        if failure is not None and tx.now < failure.retry_at:  # (2)
            continue
        plan = plan or _Plan(tx)
        if not all(_place(plan, name) for _ in range(lacking)):
            unplaced.append(name)  # (9)
    return tuple(unplaced)


def _place(plan: _Plan, name: str) -> bool:
    """Steps (3) to (8) of ``place_wanted`` for one engine: whether it starts or something is on its way for it."""
    tx = plan.tx
    need = need_of(tx.models[name])
    engines = tx.engines_of(name)
    served = any(live(engine) for engine in engines)
    own = next((e for e in engines if can_cancel_drain(e) and _spared(plan, e, served)), None)
    if own is not None:  # (3)
        cancel_drain(tx, own)  # if the edge has not acknowledged the drain yet, then in a later step
        plan.free(own, -1)
        return True
    if _wake(plan, engines):
        return True
    if plan.knows(plan.hopeless, name, need) and not plan.any_ends:
        return False
    slot = free_slot(tx, name, plan.in_use)
    if slot is None:  # (4)
        _evict_for_slot(plan)
        return True
    may_evict = not served and (tx.wanted(name) or tx.unattended(name))
    if _find_room(plan, name, need, slot, may_evict):
        return True
    return plan.any_ends and not served and _find_room(plan, name, need, slot, may_evict, ending=True)  # (8)


def _wake(plan: _Plan, engines: Iterable[Engine]) -> bool:
    """Whether an engine that sleeps wakes, or something is on its way for that: (1) it falls asleep: wait; (2) there is
    room on its GPUs, and nothing moves there: wake it; (3) there will be: wait."""
    for engine in engines:
        node = plan.tx.nodes.rows[engine.node]
        if engine.state is EngineState.FALLING_ASLEEP and stays(node):  # (1)
            return True
        if engine.state is not EngineState.ASLEEP or not stays(node):
            continue
        (part,) = engine.parts
        needed_mib = part.mib - engine.kept_mib
        now, later, unsettled = plan.now(node), plan.later(node), plan.unsettled.get(node.id, set())
        if any(later.gpus[gpu] < needed_mib for gpu in part.gpus):
            continue
        quiet = unsettled.isdisjoint(part.gpus) and all(now.gpus[gpu] >= needed_mib for gpu in part.gpus)
        if not quiet or not begin_wake(plan.tx, engine):
            plan.reserve(node, part.gpus, needed_mib)  # (3)
        plan.unsettle(node, part.gpus)  # (2)
        return True
    return False


def _find_room(plan: _Plan, name: str, need: Need, slot: int, may_evict: bool, *, ending: bool = False) -> bool:
    """Steps (5) to (7) of ``place_wanted``: whether ``name`` starts, or room for it is on its way."""
    if not ending and plan.knows(plan.hopeless, name, need):
        return False
    where = takes(plan.tx, name, ending=ending)
    full = not ending and plan.knows(plan.full, name, need)
    if not full and (fit := plan.best(need, where, _When.AT_ONCE)) is not None:  # (5)
        _start(plan.tx, name, fit[0], fit[1], slot)
        plan.in_use.add(slot)
        plan.unsettle(*fit)
        return True
    if not ending:
        plan.learn(plan.full, name, need)
    if (fit := plan.best(need, where, _When.ONCE_QUIET)) is not None:  # (6)
        plan.reserve(fit[0], fit[1], need.mib)
        plan.unsettle(*fit)  # or those that came later would keep it waiting
        return True
    if (fit := plan.best(need, where, _When.ONCE_FREED)) is not None:
        plan.reserve(fit[0], fit[1], need.mib)
        return True
    if not may_evict:
        return False
    unattended = plan.tx.unattended(name)
    if (chosen := plan.cheapest(need, where, claimed=unattended)) is not None:  # (7)
        _evict(plan, chosen[0], chosen[1], need)
        return True
    if not ending and not unattended:
        plan.learn(plan.hopeless, name, need)
    return False


def _no_less(need: Need, other: Need) -> bool:
    return (need.gpus == 0) == (other.gpus == 0) and need.gpus >= other.gpus and need.mib >= other.mib


def _spared(plan: _Plan, engine: Engine, served: bool) -> bool:
    """Whether the room that ``engine`` is giving up is still there for itself, after models that wait longer. One whose
    node ends will do where nothing else serves."""
    for part in engine.parts:
        node = plan.tx.nodes.rows[part.node]
        if node.phase is not NodePhase.UP or (served and node.ending):
            return False
        later = plan.later(node)
        if min((later.gpus[gpu] for gpu in part.gpus), default=later.host) < part.mib:
            return False
    return True


def _start(tx: Transaction, name: str, node: Node, gpus: tuple[int, ...], slot: int) -> None:
    take_slot(tx, name, slot)
    serial = tx.next_serial()
    model = tx.models[name]
    label = re.sub(r"[^A-Za-z0-9.]+", "-", name)[:40]
    engine = Engine(
        id=tx.name(label, serial),
        model=name,
        parts=(Part(node.id, gpus, model.memory_mib),),
        state=EngineState.LOADING,
        since=tx.now,
        started=tx.now,
        slot=slot,
        sleep_mib=first_sleep_mib(tx, tx.nodes.rows[node.id], model),
        last_used=max((other.last_used for other in tx.engines_of(name)), default=0.0),
    )
    tx.add_engine(engine)
    tx.emit(StartEngine(engine.id, node.id, model, gpus, slot, tx.epoch, engine.sleep_mib))


def _evict(plan: _Plan, node: Node, chosen: tuple[Engine, ...], need: Need) -> None:
    for engine in chosen:
        plan.evict(engine)
    devices = plan.later(node).devices(need)
    assert devices is not None, "victims make room"
    plan.reserve(node, devices, need.mib)
    plan.tx.switches += 1


def _evict_for_slot(plan: _Plan) -> None:
    """More models than slots: the evictable engine of the lowest rank goes, one at a time."""
    tx = plan.tx
    going = (EngineState.DRAINING, EngineState.STOPPING)
    if tx.closing.rows or any(state in going for state in tx.moving.rows.values()):
        return
    idle = [engine for engines in plan.idle_engines().values() for engine in engines]
    if idle:
        asleep = [engine for engine in idle if engine.state is EngineState.ASLEEP]
        victim = min(asleep or idle, key=lambda engine: (plan.rank(engine), engine.id))
        plan.evict(victim, "slot-needed")
        tx.switches += 1
