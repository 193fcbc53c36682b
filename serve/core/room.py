"""Room: free memory of nodes, needs of engines, and loads that disturb one another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from gateway_plugin.catalog import Model
from serve.core.beside import Others, blocked_s, by_gpu
from serve.core.policy import NodeTypeSpec
from serve.core.state import Engine, EngineState, Fleet, Node, reservation, stays
from serve.core.table import seen


class Need(NamedTuple):
    """Memory needed by one engine of a model: ``mib`` on each of ``gpus`` devices, or of the host if ``gpus`` is 0."""

    gpus: int
    mib: int


class Room(NamedTuple):
    """Free memory of one node in MiB: of the host, and of each GPU by index."""

    host: int
    gpus: tuple[int, ...]

    def devices(
        self, need: Need, within: Room | None = None, last: Collection[int] = (), others: Others = ()
    ) -> tuple[int, ...] | None:
        """The devices to take, tightest fit first, ties by index: ``()`` for the host, ``None`` if it does not fit.

        ``within``: it must fit there too, on the same devices. ``last``: devices that are taken after all others.
        ``others``: of devices of equal rank those where a load costs them least, before the tightest fit.
        """
        if need.gpus == 0:
            return () if self.host >= need.mib and (within is None or within.host >= need.mib) else None
        each = by_gpu(others)
        fit = [
            (index in last, each.get(index, 0.0), free, index)
            for index, free in enumerate(self.gpus)
            if free >= need.mib and (within is None or within.gpus[index] >= need.mib)
        ]
        if len(fit) < need.gpus:
            return None
        fit.sort()
        sets = [fit[: need.gpus]]
        if need.gpus > 1:  # those of one that sleeps, filled up with, or cut to, the best
            mine = [sorted(fit, key=lambda one: (one[-1] not in gpus, one)) for gpus, _ in others if len(gpus) > 1]
            sets += [one[: need.gpus] for one in mine]
        ranked = [(sum(one[0] for one in some), tuple(sorted(one[-1] for one in some))) for some in sets]
        return min(ranked, key=lambda one: (one[0], blocked_s(one[1], others)))[1]

    def add(self, gpus: tuple[int, ...], mib: int) -> Room:
        """With ``mib`` more (or less) on these devices, or on the host where there are none."""
        if not gpus:
            return Room(self.host + mib, self.gpus)
        return Room(self.host, tuple(free + mib if index in gpus else free for index, free in enumerate(self.gpus)))

    def without(self, engine: Engine, node: str, sign: int = 1) -> Room:
        """With the memory of ``engine`` on ``node`` freed; ``sign`` -1: taken again."""
        room = self
        for part in reservation(engine):
            if part.node == node:
                room = room.add(part.gpus, sign * part.mib)
        return room


def need_of(model: Model) -> Need:
    return Need(model.gpus, model.memory_mib)


def holds(thing: Node | NodeTypeSpec, need: Need) -> bool:
    """Whether it would fit on an empty node."""
    if need.gpus == 0:
        return thing.host_mib >= need.mib
    return sum(1 for total in thing.gpu_mib if total >= need.mib) >= need.gpus


def has_room(node: Node, need: Need) -> bool:
    """Whether it fits into the free room."""
    if need.gpus == 0:
        return node.free_host_mib >= need.mib
    if max(node.free_gpu_mib, default=0) < need.mib:
        return False
    return sum(free >= need.mib for free in node.free_gpu_mib) >= need.gpus


def with_room(nodes: Mapping[str, Node], need: Need) -> Sequence[Node]:
    """Nodes into whose free room it fits."""
    return [node for node in nodes.values() if has_room(node, need)]


def could_ever_hold(node_types: tuple[NodeTypeSpec, ...], nodes: Mapping[str, Node], need: Need) -> bool:
    """Whether any node here, or of a node type that may be requested, is large enough."""
    return any(kind.max_nodes > 0 and holds(kind, need) for kind in node_types) or any(
        holds(node, need) for node in nodes.values()
    )


_MEASURES = (EngineState.LOADING, EngineState.FALLING_ASLEEP, EngineState.WAKING)
"""States of an engine whose memory on its GPUs is being measured, by itself or by its agent."""


def loads_beside(engine: Engine, others: Iterable[Engine]) -> Engine | None:
    """The engine on its node whose load, sleep or wake on a shared GPU must finish before this one is stopped or put
    to sleep."""
    mine = engine.devices
    loading = [
        other
        for other in others
        if other.state in _MEASURES and other.id != engine.id and not mine.isdisjoint(other.devices)
    ]
    return min(loading, key=lambda other: other.id, default=None)


def unsettles(engine: Engine, *, due: bool) -> bool:
    """Whether nothing may start on its GPUs. ``due``: its drain is over, and it only waits to be stopped; if others
    could start meanwhile, it would wait for ever."""
    if engine.state is EngineState.DRAINING:
        return due
    return engine.state in (*_MEASURES, EngineState.STOPPING)


def waits_for(fleet: Fleet, need: Need) -> Engine | None:
    """The engine whose load, stop, sleep or wake on a GPU keeps ``need`` from starting there.

    (1) there is free room on quiet GPUs: none; (2) there is free room, but where something loads, stops, falls asleep
    or wakes; (3) the engines to be stopped must wait for that first, or one falls asleep to make room.
    """
    if need.gpus == 0:
        return None
    moving = {part.node for name in fleet.moving for part in fleet.engines[name].parts}
    if any(node.id not in moving and stays(node) for node in seen(fleet.nodes, with_room, need)):
        return None  # (1)
    found: Engine | None = None
    for node in (fleet.nodes[name] for name in sorted(moving)):
        if not stays(node):
            continue
        engines = [fleet.engines[engine] for engine in node.engines]
        at = {
            gpu: engine
            for engine in engines
            if unsettles(engine, due=engine.drained_idle)
            for part in engine.on(node.id)
            for gpu in part.gpus
        }
        devices = Room(node.free_host_mib, node.free_gpu_mib).devices(need, last=at)
        if devices is not None:
            if at.keys().isdisjoint(devices):  # (1)
                return None
            found = found or next(at[gpu] for gpu in devices if gpu in at)  # (2)
            continue
        going = [one for one in engines if one.state in (EngineState.DRAINING, EngineState.STOPPING)]
        held = (loads_beside(one, engines) for one in going if not one.stop_sent)
        found = found or next((other for other in held if other is not None), None)  # (3)
        found = found or next((one for one in engines if one.state is EngineState.FALLING_ASLEEP), None)
    return found


def wait_s(fleet: Fleet, engine: Engine, now: float) -> float:
    """How long the load, stop, sleep or wake of ``engine`` may still take, in seconds.

    (1) waking; (2) its first sleep: its host memory is pinned, at some GiB/s; (3) loading; else little.
    """
    since_s = now - engine.since
    if engine.state is EngineState.WAKING:  # (1)
        return max(1.0, fleet.wake_s.get(engine.model, fleet.policy.wake_guess_s) - since_s)
    if engine.state is EngineState.FALLING_ASLEEP and not engine.slept:  # (2)
        return max(1.0, engine.sleep_mib / 1024 - since_s)
    if engine.state is not EngineState.LOADING:
        return 1.0
    return max(1.0, fleet.load_s.get(engine.model, fleet.policy.load_guess_s) - (now - engine.started))


def wait_words(engine: Engine) -> str:
    """Of ``waits_for``, for all users."""
    done = {
        EngineState.LOADING: "has loaded",
        EngineState.FALLING_ASLEEP: "has fallen asleep",
        EngineState.WAKING: "has woken",
    }
    return f"waits until '{engine.model}' {done.get(engine.state, 'has ended')} on the same GPU"


class Able(NamedTuple):
    """The evictable engines of one node, each list with the cheapest first."""

    host: list[tuple[float, Engine, int]]
    """Its cost, the engine, and what it holds there in MiB."""
    gpus: dict[int, list[tuple[float, Engine, int]]]
    """The same by GPU."""
    sets: dict[tuple[int, ...], None]
    """The GPUs of each engine that has several."""
    cheapest: tuple[float, Engine]


class AbleByNode:
    """Evictable engines, each with its cost, the cheapest first, by node. A node's are looked at when it is asked for:
    mostly the first few are enough."""

    def __init__(self, candidates: Sequence[tuple[float, Engine]], nodes: Mapping[str, Node]) -> None:
        self._candidates = candidates
        self._costs = {engine.id: (cost, engine) for cost, engine in candidates}
        self._nodes = nodes
        self._made: dict[str, Able | None] = {}

    def get(self, node: str) -> Able | None:
        """Those of one node; ``None``: there are none."""
        if node not in self._made:
            there = [found for one in self._nodes[node].engines if (found := self._costs.get(one)) is not None]
            self._made[node] = _able(there, node) if there else None
        return self._made[node]

    def items(self) -> Iterator[tuple[str, Able]]:
        """Each node with some, the one with the cheapest first."""
        seen: set[str] = set()
        for _, engine in self._candidates:
            for part in engine.parts:
                if part.node not in seen:
                    seen.add(part.node)
                    able = self.get(part.node)
                    if able is not None:
                        yield part.node, able


def _able(there: list[tuple[float, Engine]], node: str) -> Able | None:
    able: Able | None = None
    for cost, engine in sorted(there, key=lambda one: (one[0], one[1].id)):
        for part in reservation(engine):
            if part.node != node:
                continue
            able = able or Able([], {}, {}, (cost, engine))
            held = (cost, engine, part.mib)
            if not part.gpus:
                able.host.append(held)
            for gpu in part.gpus:
                able.gpus.setdefault(gpu, []).append(held)
            if len(part.gpus) > 1:
                able.sets[part.gpus] = None
    return able


_Held = tuple[float, Engine, int]


def victims(
    able: Able,
    room: Room,
    need: Need,
    *,
    summed: bool,
    spared: Collection[str] = (),
    others: Others = (),
) -> Victims | None:
    """The cheapest set of evictable engines of one node without which ``need`` fits into ``room``, or ``None``.

    ``summed``: a set costs the sum, else as much as the most expensive engine. ``spared``: ids of engines that stay.
    ``others``: what they wait for a load there counts in the choice.
    """
    if need.gpus == 0:
        return _set(_fewest(able.host, room.host, need.mib, spared), (), summed)
    alone = {gpu: _fewest(able.gpus.get(gpu, ()), free, need.mib, spared) for gpu, free in enumerate(room.gpus)}
    if need.gpus == 1:
        each = [_set(chosen, (gpu,), summed, others) for gpu, chosen in alone.items()]
        return min((one for one in each if one is not None), key=_first, default=None)
    beside = by_gpu(others)
    costs = sorted(
        (sum(cost / len(engine.parts[0].gpus) for cost, engine, _ in chosen) + beside.get(gpu, 0.0), gpu)
        for gpu, chosen in alone.items()
        if chosen is not None
    )
    if len(costs) < need.gpus:
        return None
    sets = {tuple(sorted(gpu for _, gpu in costs[: need.gpus])): None}
    for mine in able.sets:  # filled up with, or cut to, the cheapest
        first = sorted(costs, key=lambda one: (one[1] not in mine, one))
        sets[tuple(sorted(gpu for _, gpu in first[: need.gpus]))] = None
    each = [_set(_on_all(gpus, able, room, need.mib, spared), gpus, summed, others) for gpus in sets]
    return min((one for one in each if one is not None), key=_first, default=None)


def victims_on(
    able: Able, room: Room, gpus: tuple[int, ...], mib: int, *, summed: bool, spared: Collection[str] = ()
) -> Victims | None:
    """The same for these GPUs and no others."""
    chosen = _on_all(gpus, able, room, mib, spared)
    freed = {gpu: sum(held for _, engine, held in able.gpus.get(gpu, ()) if _among(engine, chosen)) for gpu in gpus}
    enough = all(room.gpus[gpu] + freed[gpu] >= mib for gpu in gpus)
    return _set(chosen, gpus, summed) if enough else None


def _among(engine: Engine, chosen: Sequence[_Held]) -> bool:
    return any(one.id == engine.id for _, one, _ in chosen)


class Victims(NamedTuple):
    """Engines to evict on one node for one need."""

    cost: float
    engines: tuple[Engine, ...]
    gpus: tuple[int, ...]
    """The devices that they and the free room make up; none for the host."""
    beside_s: float = 0.0
    """What those that sleep there wait for a load: it counts in the choice of a set, and not against a limit."""


def _first(one: Victims) -> tuple[float, int, tuple[int, ...]]:
    return one.cost + one.beside_s, len(one.engines), one.gpus


def _set(chosen: Sequence[_Held] | None, gpus: tuple[int, ...], summed: bool, others: Others = ()) -> Victims | None:
    if not chosen:
        return None
    costs = [cost for cost, *_ in chosen]
    engines = tuple(engine for _, engine, _ in chosen)
    return Victims(sum(costs) if summed else max(costs), engines, gpus, blocked_s(gpus, others))


def _on_all(gpus: tuple[int, ...], able: Able, room: Room, mib: int, spared: Collection[str]) -> list[_Held]:
    """The engines to evict so that each of ``gpus`` has ``mib`` free; those of one GPU may free others."""
    chosen: dict[str, _Held] = {}
    for gpu in gpus:
        there = able.gpus.get(gpu, ())
        free = room.gpus[gpu] + sum(held for _, engine, held in there if engine.id in chosen)
        if free < mib:
            left = [one for one in there if one[1].id not in chosen]
            chosen |= {one[1].id: one for one in _fewest(left, free, mib, spared) or ()}
    return list(chosen.values())


def _fewest(there: Sequence[_Held], free: int, mib: int, spared: Collection[str]) -> list[_Held] | None:
    """The cheapest ones until ``mib`` is free on one device, less those that are not needed for it (the most expensive
    is spared first); ``None``: not even without all."""
    chosen: list[_Held] = []
    for one in there:
        if free >= mib:
            break
        if one[1].id not in spared:
            chosen.append(one)
            free += one[2]
    if free < mib:
        return None
    if len(chosen) > 1:
        for one in reversed(tuple(chosen)):
            if free - one[2] >= mib:
                chosen.remove(one)
                free -= one[2]
    return chosen
