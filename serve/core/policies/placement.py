"""Placement of wanted models. Everything is decided afresh in every step, in the order of ``Policies.order``.

A model that waits for room to be freed reserves its need (``serve.core.policies.plan``): in ``later`` all of it, in
``now`` as much as is there. The models after it start where they fit into the rest: so room goes to the first one, and
no room is freed twice.
On a GPU nothing starts while another engine loads or stops there (``serve.core.room``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from serve.core.crowds import crowded_out
from serve.core.effects import StartEngine
from serve.core.events import Part
from serve.core.node_times import takes
from serve.core.plan import Plan, When
from serve.core.room import Need, Victims, need_of, victims_on
from serve.core.sleep_room import MAY_SLEEP, could_sleep, first_sleep_mib
from serve.core.slots import free_slot, take_slot
from serve.core.state import Action, Engine, EngineState, Node, NodePhase, Weighed, live, stays
from serve.core.transaction import Transaction
from serve.core.transitions import begin_wake, can_cancel_drain, cancel_drain

_WEIGHED_AT_LEAST_S = 1.0
_WEIGHED_S_AN_ENGINE = 0.002
"""A model for which nothing may go yet is weighed again after this time. In a small fleet that is at every tick, and
whenever an engine or a node has changed; in one of 500 engines, where it costs milliseconds and something always
changes, once a second."""


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
    (7) it fits once engines of one node are gone: evict the cheapest such set, once it is worth less than the model's
        waiters weigh, unless it is only handed over (a model that no client waits for takes no room of one that was
        loaded and waits for its first request);
    (8) it has no engine, and (5) to (7) go on a node whose end is near but leaves it useful time;
    (9) no room.
    """
    plan: Plan | None = None
    unplaced: list[str] = []
    for name in list(tx.room_for.rows):
        if name not in tx.queues.rows or any(live(engine) for engine in tx.engines_of(name)):
            tx.room_for.drop(name)
    for name in [name for name in tx.weighed.rows if name not in tx.queues.rows]:
        tx.weighed.drop(name)
    wanted = tx.policies.order(tx)
    for name in (*wanted, *(model for model in handed_over if model not in wanted)):
        lacking = tx.deficit(name, replaced=name in handed_over)
        if lacking <= 0:  # (1)
            continue
        failure = tx.failures.rows.get(name)
        if failure is not None and tx.now < failure.retry_at:  # (2)
            continue
        plan = plan or Plan(tx)
        if not all(_place(plan, name) for _ in range(lacking)):
            unplaced.append(name)  # (9)
    return tuple(unplaced)


def _place(plan: Plan, name: str) -> bool:
    """Steps (3) to (8) of ``place_wanted`` for one engine: whether it starts or something is on its way for it."""
    tx = plan.tx
    need = need_of(tx.models[name])
    engines = tx.engines_of(name)
    served = any(live(engine) for engine in engines)
    own = next((e for e in engines if can_cancel_drain(e) and _spared(plan, e, served)), None)
    if own is not None:  # (3)
        tx.decide(Action.KEEP, name, "it is wanted again, and no model before it needs the room", engine=own.id)
        cancel_drain(tx, own)  # if the edge has not acknowledged the drain yet, then in a later step
        plan.free(own, -1)
        return True
    if _wake(plan, name, engines):
        return True
    if plan.knows(plan.hopeless, name, need) and not plan.any_ends:
        return False
    slot = free_slot(tx, name, plan.in_use)
    if slot is None:  # (4)
        _evict_for_slot(plan, name)
        return True
    may_evict = not served and (tx.wanted(name) or tx.unattended(name))
    if may_evict and (waits := _evict_to_wake(plan, name, engines)) is not None:
        return waits
    if _find_room(plan, name, need, slot, may_evict):
        return True
    return plan.any_ends and not served and _find_room(plan, name, need, slot, may_evict, ending=True)  # (8)


def _wake(plan: Plan, name: str, engines: Iterable[Engine]) -> bool:
    """Whether an engine that sleeps wakes, or something is on its way for that: (1) it falls asleep, or will when what
    is in flight has ended, and wakes sooner than another one loads: wait; (2) there is room on its GPUs, and nothing
    moves there: wake it; (3) there will be: wait, unless that takes too long. Of several one of (2) is the first."""
    for engine in sorted(engines, key=lambda one: not _could_wake(plan, one)):
        node = plan.tx.nodes.rows[engine.node]
        if stays(node) and (engine.state is EngineState.FALLING_ASLEEP or _drains_to_sleep(plan.tx, engine)):  # (1)
            return True
        if engine.state is not EngineState.ASLEEP or not stays(node):
            continue
        (part,) = engine.parts
        needed_mib, later = part.mib - engine.kept_mib, plan.later(node)
        if any(later.gpus[gpu] < needed_mib for gpu in part.gpus):
            continue
        if not _could_wake(plan, engine) or not begin_wake(plan.tx, engine):
            if _loads_elsewhere(plan, name):
                continue
            plan.reserve(node, part.gpus, needed_mib)  # (3)
        plan.unsettle(node, part.gpus)  # (2)
        return True
    return False


def _could_wake(plan: Plan, engine: Engine) -> bool:
    """It sleeps, there is room on its GPUs, and nothing moves there."""
    node, part = plan.tx.nodes.rows[engine.node], engine.parts[0]
    if engine.state is not EngineState.ASLEEP or not stays(node):
        return False
    if not plan.unsettled.get(node.id, set()).isdisjoint(part.gpus):
        return False
    now, later, needed_mib = plan.now(node), plan.later(node), part.mib - engine.kept_mib
    return all(min(now.gpus[gpu], later.gpus[gpu]) >= needed_mib for gpu in part.gpus)


def _drains_to_sleep(tx: Transaction, engine: Engine) -> bool:
    """Whether it drains, sleeps then, and is expected to be awake again sooner than an engine is loaded."""
    if engine.state is not EngineState.DRAINING or engine.stop_reason not in MAY_SLEEP or not could_sleep(tx, engine):
        return False
    since_s, load_s = tx.now - engine.since, tx.load_time_s(engine.model)
    left_s = max(0.0, tx.drain_s.rows.get(engine.model, 0.0) - since_s)
    return since_s < load_s / 2 and left_s + tx.wake_time_s(engine.model) < load_s


def _find_room(plan: Plan, name: str, need: Need, slot: int, may_evict: bool, *, ending: bool = False) -> bool:
    """Steps (5) to (7) of ``place_wanted``: whether ``name`` starts, or room for it is on its way."""
    if not ending and plan.knows(plan.hopeless, name, need):
        return False
    where = takes(plan.tx, name, ending=ending)
    full = not ending and plan.knows(plan.full, name, need)
    if not full and (fit := plan.best(name, need, where, When.AT_ONCE)) is not None:  # (5)
        _start(plan.tx, name, fit[0], fit[1], slot)
        plan.in_use.add(slot)
        plan.unsettle(*fit)
        return True
    if not ending:
        plan.learn(plan.full, name, need)
    if (fit := plan.best(name, need, where, When.ONCE_QUIET)) is not None:  # (6)
        plan.reserve(fit[0], fit[1], need.mib)
        plan.unsettle(*fit)  # or those that came later would keep it waiting
        return True
    if (fit := plan.best(name, need, where, When.ONCE_FREED)) is not None:
        plan.reserve(fit[0], fit[1], need.mib)
        return True
    if not may_evict:
        return False
    unattended = plan.tx.unattended(name)
    if (last := _just_weighed(plan.tx, name)) is not None:
        return last.waits
    if (chosen := plan.cheapest(name, need, where, claimed=unattended)) is not None:  # (7)
        return _evict(plan, name, chosen[0], chosen[1], need)
    plan.tx.weighed.put(name, Weighed(plan.tx.now, waits=False))
    if not ending and not unattended and not plan.dear:
        plan.learn(plan.hopeless, name, need)
    return False


def _just_weighed(tx: Transaction, name: str) -> Weighed | None:
    """Its last weighing, if that still holds."""
    last = tx.weighed.rows.get(name)
    again_s = min(_WEIGHED_AT_LEAST_S, _WEIGHED_S_AN_ENGINE * len(tx.engines.rows))
    changed = tx.fleet_changed and again_s < _WEIGHED_AT_LEAST_S
    return None if last is None or changed or tx.now >= last.at + again_s else last


def _spared(plan: Plan, engine: Engine, served: bool) -> bool:
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
    tx.decide(Action.LOAD, name, tx.policies.because(tx, name, 0.0), engine=engine.id)
    tx.emit(StartEngine(engine.id, node.id, model, gpus, slot, tx.epoch, engine.sleep_mib))


def _evict(plan: Plan, name: str, node: Node, chosen: Victims, need: Need) -> bool:
    """Whether they are worth less than what waits."""
    tx = plan.tx
    price = tx.policies.price(tx, chosen.engines, chosen.cost)
    why = tx.policies.because(tx, name, price)
    if price > tx.policies.limit(tx, name):
        tx.decide(Action.WAIT, name, why, other=chosen.engines[0].model)
        waiter = tx.attended(name)
        soon = waiter is None or tx.now < waiter.since + tx.load_time_s(name)
        waits = soon and not any(engine.in_flight for engine in chosen.engines)  # else another node is asked for
        tx.weighed.put(name, Weighed(tx.now, waits))
        return waits
    for engine in chosen.engines:
        plan.evict(engine, name, why)
    plan.reserve(node, chosen.gpus, need.mib)
    tx.room_for.put(name, tx.now)
    tx.switches += 1
    return True


def _evict_to_wake(plan: Plan, name: str, engines: Sequence[Engine]) -> bool | None:
    """Others make way on the GPUs of an engine that sleeps: it wakes there sooner than one loads elsewhere, and a
    second one would take host memory from other sleepers.

    (1) of its engines that sleep, the one for which the cheapest others go: as ``_evict``; (2) none may go yet, but
    what loads, drains or has just begun to serve there will within the bound of a load: wait; (3) ``None``: none
    sleeps, or its GPUs are held for longer, or by pinned models, or it has waited too long for them beside free room
    elsewhere, or they are crowded (``serve.core.crowds``).
    """
    tx = plan.tx
    best: tuple[Victims, Node, Need] | None = None
    hoped_for: Engine | None = None
    for engine in engines:
        node = tx.nodes.rows[engine.node]
        if engine.state is not EngineState.ASLEEP or not stays(node):
            continue
        (part,) = engine.parts
        need = Need(len(part.gpus), part.mib - engine.kept_mib)
        able = plan.candidates(name).get(node.id)
        spared = plan.evicted | {engine.id}
        found = None
        if able is not None:
            found = victims_on(able, plan.later(node), part.gpus, need.mib, summed=tx.policies.summed, spared=spared)
        if found is not None and (best is None or found.cost < best[0].cost):
            best = (found, node, need)
        elif found is None:
            wakes_in_s = _frees_in_s(tx, node, frozenset(part.gpus)) + tx.wake_time_s(name)
            hoped_for = hoped_for or (engine if wakes_in_s < _bound_s(tx, name) else None)
    if best is None and hoped_for is None:
        return None  # (3)
    if best is not None and best[0].cost <= tx.policies.limit(tx, name):
        return _evict(plan, name, best[1], best[0], best[2])  # (1)
    if _loads_elsewhere(plan, name) or crowded_out(plan, name, engines):
        return None  # (3)
    if best is not None:  # (1) no node is asked for while there is free room
        return _evict(plan, name, best[1], best[0], best[2]) or _fits(plan, name)
    assert hoped_for is not None, "it was looked for"
    why = "its engine sleeps, and what holds its GPUs loads, drains or has just begun to serve"
    tx.decide(Action.WAIT, name, why, engine=hoped_for.id)
    return True  # (2)


def _loads_elsewhere(plan: Plan, name: str) -> bool:
    """Whether it has waited for half of a load's bound for an engine to wake, and there is free room elsewhere: not
    sooner, as that room is GPUs where others sleep that may be asked for."""
    tx = plan.tx
    waiter = tx.attended(name)
    return waiter is not None and tx.now >= waiter.since + _bound_s(tx, name) / 2 and _fits(plan, name)


def _bound_s(tx: Transaction, name: str) -> float:
    return max(tx.policy.max_wait_s, tx.policy.max_wait_loads * tx.load_time_s(name))


def _fits(plan: Plan, name: str) -> bool:
    tx = plan.tx
    return plan.best(name, need_of(tx.models[name]), takes(tx, name, ending=False), When.AT_ONCE) is not None


def _frees_in_s(tx: Transaction, node: Node, gpus: frozenset[int]) -> float:
    """Seconds until every engine on these GPUs could go: (1) pinned: never; (2) it loads, wakes or falls asleep;
    (3) it serves (``Policies.held_s``); (4) it drains, as long as its model's last drain took."""
    latest = 0.0
    for other in (tx.engines.rows[engine] for engine in node.engines):
        if other.state is EngineState.ASLEEP or all(gpus.isdisjoint(part.gpus) for part in other.on(node.id)):
            continue
        if other.model in tx.pinned:  # (1)
            return math.inf
        if other.state is EngineState.READY:  # (3)
            left_s = tx.policies.held_s(tx, other)
        elif other.state is EngineState.DRAINING:  # (4)
            left_s = tx.drain_s.rows.get(other.model, 0.0)
        elif other.state is EngineState.LOADING:  # (2)
            left_s = tx.load_time_s(other.model) - (tx.now - other.since)
        else:
            left_s = tx.wake_time_s(other.model)
        latest = max(latest, left_s)
    return latest


def _evict_for_slot(plan: Plan, name: str) -> None:
    """More models than slots: the cheapest engine goes, one at a time; one that sleeps before all others."""
    tx = plan.tx
    moving = [tx.engines.rows[engine] for engine in tx.moving.rows]
    if any(one.state is EngineState.STOPPING or one.stop_reason == "slot-needed" for one in moving):
        return  # one that drains for another reason may fall asleep, or take long
    if any(engine not in tx.engines.rows for engine in tx.closing.rows):
        return
    there = [one for one in tx.policies.candidates(tx, name) if one[1].id not in plan.evicted]
    asleep = [one for one in there if one[1].state is EngineState.ASLEEP]
    cost, engine = next(iter(asleep or there), (math.inf, None))
    if engine is not None and cost <= tx.policies.limit(tx, name):
        why = f"no slot at the edge is free, and {tx.policies.because(tx, name, cost)}"
        plan.evict(engine, name, why, reason="slot-needed")
        tx.room_for.put(name, tx.now)
        tx.switches += 1
