"""One pass of placement: room now and later, what is reserved in it, and which engines may go.

``now`` is the free room of a node; ``later`` adds what drains or stops there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum, auto

from serve.core.beside import TURN_S, Others, blocked_s, turns
from serve.core.engine_use import drain_is_over, unclaimed
from serve.core.looking import not_just_serving
from serve.core.room import AbleByNode, Need, Room, Victims, holds, unsettles, victims, with_room
from serve.core.sleep_room import outlived
from serve.core.slots import slots_in_use
from serve.core.state import Action, Engine, EngineState, Node, reservation
from serve.core.table import seen
from serve.core.transaction import Transaction
from serve.core.transitions import begin_stop

Where = Callable[[Node], bool]
"""Filter of nodes."""


class When(Enum):
    AT_ONCE = auto()
    """There is free room, and nothing loads or stops on its GPUs."""
    ONCE_QUIET = auto()
    """There is free room, on GPUs where something loads or stops."""
    ONCE_FREED = auto()
    """There is room when what drains or stops is gone."""


class Plan:
    """State of one pass: free room now, and later."""

    def __init__(self, tx: Transaction) -> None:
        self.tx = tx
        self.delta: dict[str, Room] = {}
        """Node -> room being freed there less reservations."""
        self.held: dict[str, Room] = {}
        """Node -> free room that is kept for models that wait for more to be freed there."""
        self.in_use = slots_in_use(tx)
        self.able: dict[int, AbleByNode] = {}
        """Of ``candidates``."""
        self.evicted: set[str] = set()
        """In this pass."""
        self.dear = False
        """The last search for victims ended because all that are left cost more than the model's limit."""
        self.full: list[tuple[Need, float, int]] = []
        self.hopeless: list[tuple[Need, float, int]] = []
        """Needs, load times and how many engines might go, for which nodes that stay have no free room, and none even
        after evictions. Room only shrinks during the pass: an equal or larger need, with an equal or longer load and
        no more engines to evict, need not be tried again."""
        self.any_ends = any(node.ending for node in seen(tx.nodes.rows, not_just_serving))
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

    def knows(self, tried: list[tuple[Need, float, int]], model: str, need: Need) -> bool:
        """Whether an equal or smaller need found nothing."""
        if not tried:
            return False
        load_s, many = self.tx.load_time_s(model), self._many(tried, model)
        return any(load_s >= other_s and many <= more and _no_less(need, other) for other, other_s, more in tried)

    def learn(self, tried: list[tuple[Need, float, int]], model: str, need: Need) -> None:
        tried.append((need, self.tx.load_time_s(model), self._many(tried, model)))

    def _many(self, tried: object, model: str) -> int:
        return len(self.tx.policies.candidates(self.tx, model)) if tried is self.hopeless else 0

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

    def others(self, node: Node, name: str) -> Others:
        """Who sleeps there, or will, and the seconds of waiting that a load of ``name`` on any of its GPUs causes to
        it, and to both from then on."""
        if not node.sleep_mib:
            return ()
        key = (Plan.others, node.id, name)
        found: Others | None = self.tx.memo.get(key)
        if found is None:
            engines = [self.tx.engines.rows[one] for one in node.engines]
            costs = [(one.parts[0].gpus, self._beside_s(node, one, name)) for one in engines]
            found = self.tx.memo[key] = [one for one in costs if one[1]]
        return found

    def _beside_s(self, node: Node, engine: Engine, name: str) -> float:
        turns_s = TURN_S * turns_with(self.tx, node, engine, name)
        if engine.model == name or engine.state not in (EngineState.ASLEEP, EngineState.FALLING_ASLEEP):
            return turns_s
        return turns_s + self.tx.policies.blocked_s(self.tx, engine, name)

    def best(self, name: str, need: Need, where: Where, when: When) -> tuple[Node, tuple[int, ...]] | None:
        """The node and devices with the fewest loads and stops on them, then where a load of ``name`` costs sleepers
        least, then of the tightest fit, ties by id; CPU models avoid nodes with GPUs if they can."""
        best: tuple[tuple[int, bool, float, int, str], Node, tuple[int, ...]] | None = None
        for node in self._nodes(need, when):
            if not where(node):
                continue
            later, others = self.later(node), self.others(node, name)
            unsettled = self.unsettled.get(node.id, ())
            if when is When.ONCE_FREED:
                devices = later.devices(need, others=others)
            else:
                devices = self.now(node).devices(need, within=later, last=unsettled, others=others)
            if devices is None:
                continue
            loads = 0 if when is When.ONCE_FREED else sum(gpu in unsettled for gpu in devices)
            if when is When.AT_ONCE and loads:
                continue
            left = later.host - need.mib if not devices else sum(later.gpus[gpu] - need.mib for gpu in devices)
            blocks = blocked_s(devices, others)
            key = (loads, need.gpus == 0 and bool(node.gpu_mib), blocks, left, node.id)
            if best is None or key < best[0]:
                best = (key, node, devices)
        return None if best is None else best[1:]

    def _nodes(self, need: Need, when: When) -> Iterable[Node]:
        nodes = self.tx.nodes.rows
        if when is When.AT_ONCE:
            return seen(self.tx.nodes.rows, with_room, need)
        if when is When.ONCE_QUIET:
            return [nodes[node] for node in self.unsettled] if need.gpus else ()
        return [nodes[node] for node in self.delta]

    def candidates(self, name: str) -> AbleByNode:
        """The engines that may be evicted for ``name``, by node; nodes with the cheapest first."""
        found = self.tx.policies.candidates(self.tx, name)
        if id(found) not in self.able:
            self.able[id(found)] = AbleByNode(found, self.tx.nodes.rows)
        return self.able[id(found)]

    def evict(self, engine: Engine, name: str, why: str, reason: str = "evicted") -> None:
        tx = self.tx
        tx.decide(Action.EVICT, engine.model, f"'{name}' waits: {why}", engine=engine.id, other=name)
        begin_stop(tx, engine, reason)
        self.free(engine)
        self.evicted.add(engine.id)

    def cheapest(self, name: str, need: Need, where: Where, *, claimed: bool) -> tuple[Node, Victims] | None:
        """The node and its engines to evict: the cheapest set, then the smallest, ties by node.
        ``claimed``: none that waits for its first request."""
        tx = self.tx
        best: tuple[tuple[float, int, str], Node, Victims] | None = None
        limit = tx.policies.limit(tx, name)
        spared = self.evicted
        if claimed:
            spared = spared | {engine.id for engine in tx.engines.rows.values() if unclaimed(tx, engine)}
        self.dear = False
        for node_id, able in self.candidates(name).items():
            if best is not None and (able.cheapest[0], 1, node_id) > best[0]:
                break  # every set on this node and those after it costs more
            if able.cheapest[0] > limit and able.cheapest[1].in_flight:
                self.dear = True
                break
            node = tx.nodes.rows[node_id]
            if spared and spared.issuperset(node.engines):
                continue  # nothing is left that could go there
            if not where(node) or not holds(node, need):
                continue
            others = self.others(node, name)
            found = victims(able, self.later(node), need, summed=tx.policies.summed, spared=spared, others=others)
            if found is not None:
                key = (found.cost + found.beside_s, len(found.engines), node_id)
                if best is None or key < best[0]:
                    best = (key, node, found)
        return None if best is None else best[1:]


def turns_with(tx: Transaction, node: Node, engine: Engine, name: str) -> int:
    """Weight of the turns that ``name`` takes with an engine that shares a GPU with it: 0 where both fit there, where
    the engine is stopped instead of put to sleep, or where its model has another one."""
    model, (part, *further) = tx.models.get(engine.model), engine.parts
    if model is None or not model.sleeps or engine.model == name or further:
        return 0
    asking = tx.models[name]
    if all(part.mib + asking.memory_mib <= node.gpu_mib[gpu] for gpu in part.gpus):
        return 0
    if engine.state is EngineState.ASLEEP and outlived(tx, engine):
        return 0
    return turns(asking.gpus, len(part.gpus))


def _no_less(need: Need, other: Need) -> bool:
    return (need.gpus == 0) == (other.gpus == 0) and need.gpus >= other.gpus and need.mib >= other.mib
