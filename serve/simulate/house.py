"""A small decision loop for baselines: it has the controller's events and effects, and leaves to a ``Rule`` which model
comes first, what its place is worth, and whether that is a reason to switch.

Beside the core's abilities: busy engines may be victims. They are drained, and stopped when the edge reports nothing in
flight. As in the gateway nothing starts on a GPU while another engine loads or stops there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gateway_plugin.catalog import Model
from gateway_plugin.errors import WaitDeadline
from serve.core import effects as ef
from serve.core import events as ev

INF = float("inf")
ARRIVAL_S = 0.05
"""For this time after its route opened an engine's waiters are on their way to it."""


@dataclass
class Seat:
    """An engine, as far as the controller knows it."""

    id: str
    model: str
    node: str
    gpus: tuple[int, ...]
    mib: int
    started: float
    state: str = "loading"
    """loading, ready, draining or stopping."""
    ready_at: float = INF
    opened_at: float = INF
    """When its waiters were released."""
    in_flight: int = 0
    last_used: float = 0.0
    """The later of its last session's start and the last reading with something in flight."""
    drained: bool = False

    def place(self) -> Iterator[tuple[str, int]]:
        return ((self.node, gpu) for gpu in self.gpus)


@dataclass
class Waits:
    """The waiters of one model: ticket -> (since, deadline), oldest first."""

    tickets: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def oldest(self) -> float:
        return next(iter(self.tickets.values()))[0]


class Rule(Protocol):
    """The difference between policies. Every method is called again after each event, and once a second."""

    summed: bool
    """Worth of several victims together: the sum, or (False) the most valuable one's."""

    def saw(self, house: House, event: ev.Event, now: float) -> None:
        """Learn from an event; nothing, unless a rule says more."""
        return

    def order(self, house: House, now: float) -> Sequence[str]:
        """The waiting models to serve, the first one first."""

    def worth(self, house: House, seat: Seat, asking: str, now: float) -> float | None:
        """Worth of a ready engine while ``asking`` has no place; ``None``: it stays."""

    def may_switch(self, house: House, asking: str, victims: Sequence[Seat], worth: float, now: float) -> bool:
        """Whether these may be evicted for it."""

    def unload(self, house: House, seat: Seat, now: float) -> bool:
        """Whether a ready engine is unloaded although its room is not needed."""


@dataclass
class _Room:
    """Room of one node, in MiB by GPU: free now, and free when all that drains and stops is gone."""

    now: list[int]
    later: list[int]


class House:
    """See the module."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.models: dict[str, Model] = {}
        self._mib: dict[str, int] = {}
        self.nodes: dict[str, tuple[int, ...]] = {}
        self.seats: dict[str, Seat] = {}
        self.waiting: dict[str, Waits] = {}
        self.load_s: dict[str, float] = {}
        """As measured, the last time."""
        self._serial = 0
        self._effects: list[ef.Effect] = []

    def tell(self, event: ev.Event, now: float) -> tuple[ef.Effect, ...]:
        self._effects = []
        if self._hear(event, now):
            self._plan(now)
        return tuple(self._effects)

    def seats_of(self, model: str, *states: str) -> list[Seat]:
        return [seat for seat in self.seats.values() if seat.model == model and seat.state in states]

    def load_time_s(self, model: str) -> float:
        """The last load's, or the core's guess."""
        return self.load_s.get(model, 60.0)

    # --- facts ---
    def _hear(self, event: ev.Event, now: float) -> bool:
        """Whether decisions are due afterwards."""
        self.rule.saw(self, event, now)
        match event:
            case ev.CatalogChanged(models):
                self.models = {model.name: model for model in models}
                self._mib = {model.name: model.memory_mib for model in models}
            case ev.NodeJoined():
                self.nodes[event.node] = event.gpu_mib
            case ev.Acquire():
                return self._acquire(event, now)
            case ev.EngineReady(engine, load_s=load_s):
                seat = self.seats[engine]
                self.load_s[seat.model] = load_s
                seat.state, seat.ready_at, seat.last_used = "ready", now, now
                self._effects.append(ef.OpenRoute(engine, 0, 0, engine))
                return False
            case ev.RouteOpened(engine):
                seat = self.seats[engine]
                if seat.state == "ready":
                    seat.last_used = seat.opened_at = now
                    for ticket in self.waiting.pop(seat.model, Waits()).tickets:
                        self._effects.append(ef.Answer(ticket))
            case ev.RouteDrained(engine):
                self.seats[engine].drained = True
                self.seats[engine].in_flight = -1  # not known: earlier readings do not count
                return False
            case ev.EdgeSeen(servers):
                self._see(servers, now)
            case ev.EngineExited(engine):
                del self.seats[engine]
            case ev.Tick():
                self._refuse_overdue(now)
                return False  # the counters, once a second, are often enough to check the time
        return True

    def _acquire(self, event: ev.Acquire, now: float) -> bool:
        if not event.not_routed and any(seat.opened_at <= now for seat in self.seats_of(event.model, "ready")):
            self._effects.append(ef.Answer(event.ticket))
            return False
        waits = self.waiting.setdefault(event.model, Waits())
        waits.tickets[event.ticket] = (now, now + event.wait_s)
        return len(waits.tickets) == 1

    def _refuse_overdue(self, now: float) -> None:
        for model, waits in list(self.waiting.items()):
            for ticket, (_, deadline) in list(waits.tickets.items()):
                if now >= deadline:
                    del waits.tickets[ticket]
                    error = WaitDeadline("not served in time", retry_after_s=5.0, state="queued", eta_s=None)
                    self._effects.append(ef.Answer(ticket, error))
            if not waits.tickets:
                del self.waiting[model]

    def _see(self, servers: Sequence[ev.ServerSeen], now: float) -> None:
        for seen in servers:
            seat = self.seats.get(seen.engine)
            if seat is None:
                continue
            seat.in_flight = seen.in_flight
            seat.last_used = max(seat.last_used, now if seen.in_flight else seen.last_used)

    # --- decisions ---
    def _plan(self, now: float) -> None:
        """(1) drained engines stop, unless something loads on their GPUs; (2) engines that the rule unloads drain; then
        for each waiting model: (3) it loads or serves; (4) it fits: start; (5) it fits once others are gone: wait;
        (6) others may be evicted for it: drain them."""
        loading = {place for seat in self.seats.values() if seat.state == "loading" for place in seat.place()}
        for seat in self.seats.values():
            done = seat.state == "draining" and seat.drained and seat.in_flight == 0
            if done and loading.isdisjoint(seat.place()):  # (1)
                seat.state = "stopping"
                self._effects.append(ef.StopEngine(seat.id, seat.node, 1, "evicted"))
            elif seat.state == "ready" and self.rule.unload(self, seat, now):  # (2)
                self._drain(seat)
        if not self.waiting:
            return
        unquiet = loading | {p for s in self.seats.values() if s.state == "stopping" for p in s.place()}
        rooms = self._rooms()
        for model in self.rule.order(self, now):
            if self.seats_of(model, "loading", "ready"):  # (3)
                continue
            need = self.models[model]
            fit = self._fit(need, rooms, unquiet)
            if fit is not None:
                node, gpus, at_once = fit
                if at_once:  # (4)
                    self._start(need, node, gpus, now)
                    unquiet |= {(node, gpu) for gpu in gpus}
                self._claim(rooms[node], gpus, self._mib[model])  # (5)
                continue
            found = self._victims(need, rooms, now)
            if found is None or not self.rule.may_switch(self, model, found[2], found[3], now):
                continue
            node, gpus, victims, _ = found
            for seat in victims:  # (6)
                self._drain(seat)
                for gpu in seat.gpus:
                    rooms[node].later[gpu] += seat.mib
            self._claim(rooms[node], gpus, self._mib[model])

    def _rooms(self) -> dict[str, _Room]:
        rooms = {node: _Room(list(mib), list(mib)) for node, mib in self.nodes.items()}
        for seat in self.seats.values():
            room = rooms[seat.node]
            for gpu in seat.gpus:
                room.now[gpu] -= seat.mib
                if seat.state in ("loading", "ready"):
                    room.later[gpu] -= seat.mib
        return rooms

    @staticmethod
    def _claim(room: _Room, gpus: Sequence[int], mib: int) -> None:
        for gpu in gpus:
            room.later[gpu] -= mib
            room.now[gpu] = max(0, room.now[gpu] - mib)

    def _fit(
        self, need: Model, rooms: dict[str, _Room], unquiet: set[tuple[str, int]]
    ) -> tuple[str, tuple[int, ...], bool] | None:
        """Node, GPUs, whether it may start at once; the tightest fit, ties by name."""
        mib = self._mib[need.name]
        best: tuple[tuple[bool, int, str], tuple[int, ...]] | None = None
        for node, room in rooms.items():
            free = sorted((later, gpu) for gpu, later in enumerate(room.later) if later >= mib)
            if len(free) < need.gpus:
                continue
            quiet = [one for one in free if room.now[one[1]] >= mib and (node, one[1]) not in unquiet]
            at_once = len(quiet) >= need.gpus
            chosen = (quiet if at_once else free)[: need.gpus]
            key = (not at_once, sum(later for later, _ in chosen), node)
            if best is None or key < best[0]:
                best = (key, tuple(sorted(gpu for _, gpu in chosen)))
        return None if best is None else (best[0][2], best[1], not best[0][0])

    def _victims(
        self, need: Model, rooms: dict[str, _Room], now: float
    ) -> tuple[str, tuple[int, ...], list[Seat], float] | None:
        """The node, its GPUs and the engines there of the least total worth, without which ``need`` fits."""
        mib = self._mib[need.name]
        by_place: dict[tuple[str, int], list[tuple[float, str, Seat]]] = {}
        for seat in self.seats.values():
            reached = seat.state == "ready" and now >= seat.opened_at + ARRIVAL_S
            worth = self.rule.worth(self, seat, need.name, now) if reached else None
            if worth is not None:
                for place in seat.place():
                    by_place.setdefault(place, []).append((worth, seat.id, seat))
        for there in by_place.values():
            there.sort(key=lambda one: one[:2])
        best: tuple[tuple[float, int, str, tuple[int, ...]], list[Seat]] | None = None
        for node, room in rooms.items():
            costs: list[tuple[float, int]] = []
            for gpu, later in enumerate(room.later):
                alone = _take(by_place.get((node, gpu), ()), later, mib)
                if alone is not None:
                    costs.append((sum(worth / len(seat.gpus) for worth, _, seat in alone), gpu))
            costs.sort()
            for gpus in _sets(costs, need.gpus, [s for s in self.seats.values() if s.node == node]):
                chosen: dict[str, tuple[float, Seat]] = {}
                for gpu in gpus:
                    later = room.later[gpu] + sum(seat.mib for _, seat in chosen.values() if gpu in seat.gpus)
                    left = [one for one in by_place.get((node, gpu), ()) if one[1] not in chosen]
                    chosen |= {one[1]: (one[0], one[2]) for one in _take(left, later, mib) or ()}
                worths = [worth for worth, _ in chosen.values()]
                total = sum(worths) if self.rule.summed else max(worths, default=0.0)
                key = (total, len(chosen), node, gpus)
                if chosen and (best is None or key < best[0]):
                    best = (key, [seat for _, seat in chosen.values()])
        return None if best is None else (best[0][2], best[0][3], best[1], best[0][0])

    # --- commands ---
    def _start(self, model: Model, node: str, gpus: tuple[int, ...], now: float) -> None:
        self._serial += 1
        seat = Seat(f"{model.name}-{self._serial}", model.name, node, gpus, model.memory_mib, now)
        self.seats[seat.id] = seat
        self._effects.append(ef.StartEngine(seat.id, node, model, gpus, 0, 1))

    def _drain(self, seat: Seat) -> None:
        seat.state = "draining"
        self._effects.append(ef.DrainRoute(seat.id, 0, 0))


def _take(
    there: Sequence[tuple[float, str, Seat]], free_mib: int, need_mib: int
) -> list[tuple[float, str, Seat]] | None:
    """The engines on one GPU of the least worth, until ``need_mib`` is free; ``None``: not even without all."""
    taken: list[tuple[float, str, Seat]] = []
    for one in there:
        if free_mib >= need_mib:
            break
        taken.append(one)
        free_mib += one[2].mib
    return taken if free_mib >= need_mib else None


def _sets(costs: list[tuple[float, int]], gpus: int, seats: Sequence[Seat]) -> set[tuple[int, ...]]:
    """Candidate sets of GPUs: each one if one is needed; else the cheapest ones, and the GPUs of each larger engine
    filled up with (or cut to) the cheapest."""
    if len(costs) < gpus:
        return set()
    if gpus == 1:
        return {(gpu,) for _, gpu in costs}
    found = {tuple(sorted(gpu for _, gpu in costs[:gpus]))}
    for seat in seats:
        if len(seat.gpus) > 1:
            first = sorted(costs, key=lambda one: (one[1] not in seat.gpus, one))
            found.add(tuple(sorted(gpu for _, gpu in first[:gpus])))
    return found
