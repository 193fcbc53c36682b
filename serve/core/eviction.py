"""Whom to evict so that another model can be loaded: idle engines, least recently used first, the fewest on one node.

Busy engines are never victims here, unless they do not move. The issue on switching adds that a model whose waiter has
waited ``max_wait_s`` may drain a busy engine, and that victims are weighed by priority and reload cost: both belong
into ``idle`` and ``used_at``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from serve.core.change import Change, ready_at
from serve.core.fleet import Engine, EngineState, NodePhase, RouteState
from serve.core.stalls import stalled


class Need(NamedTuple):
    """What one engine of a model takes: ``mib`` on each of ``gpus`` devices, or of the host where ``gpus`` is 0."""

    gpus: int
    mib: int


class Room(NamedTuple):
    """Free memory of one node in MiB: of the host, and of each GPU by index."""

    host: int
    gpus: tuple[int, ...]

    def devices(self, need: Need, within: Room | None = None, last: Collection[int] = ()) -> tuple[int, ...] | None:
        """The devices to take, tightest fit first, ties by index: ``()`` for the host, ``None`` if it does not fit.

        ``within``: it must fit there too, on the same devices. ``last``: devices that are taken after all others.
        """
        if need.gpus == 0:
            return () if self.host >= need.mib and (within is None or within.host >= need.mib) else None
        fit = [
            (index in last, free, index)
            for index, free in enumerate(self.gpus)
            if free >= need.mib and (within is None or within.gpus[index] >= need.mib)
        ]
        fit.sort()
        return tuple(sorted(index for *_, index in fit[: need.gpus])) if len(fit) >= need.gpus else None

    def add(self, gpus: tuple[int, ...], mib: int) -> Room:
        """With ``mib`` more (or less) on these devices, or on the host where there are none."""
        if not gpus:
            return Room(self.host + mib, self.gpus)
        return Room(self.host, tuple(free + mib if index in gpus else free for index, free in enumerate(self.gpus)))


def idle(change: Change, engine: Engine) -> bool:
    """Nothing is in flight on it, and no request that was just told to go to it can be on its way."""
    return (
        engine.state is EngineState.READY
        and engine.route is not RouteState.OPENING
        and engine.in_flight == 0
        and (
            engine.last_used > engine.answered_at
            or change.now >= engine.answered_at + change.policy.first_use_grace_s
        )
    )  # fmt: skip


def abandoned(change: Change, engine: Engine) -> bool:
    """It loads, and all who waited for it have been gone for a while; but one that is more than half done is finished,
    or two models whose clients give up too early would stop each other for ever."""
    if engine.state is not EngineState.LOADING or engine.orphaned_since is None:
        return False
    spent_s, expected_s = change.now - engine.started, change.load_time_s(engine.model)
    nearly_done = expected_s / 2 <= spent_s < 2 * expected_s
    return not nearly_done and change.now >= engine.orphaned_since + change.policy.abandoned_load_grace_s


def evictable(change: Change, engine: Engine) -> bool:
    """Wanted by nobody (pins are wants), on a node that can be told to stop it; idle or stalled and resident for long
    enough, or a load that all who waited for it have left."""
    if change.wanted(engine.model):
        return False
    if abandoned(change, engine):
        return change.nodes.rows[engine.node].phase is NodePhase.UP
    if not (idle(change, engine) or stalled(engine)):
        return False
    model = change.models.get(engine.model)
    resident = model is None or change.now >= ready_at(engine) + model.min_residency_s
    return resident and change.nodes.rows[engine.node].phase is NodePhase.UP


def unclaimed(change: Change, engine: Engine) -> bool:
    """It loads, or was loaded lately, for somebody who has not come for it yet."""
    return engine.state is EngineState.LOADING or (
        not had_requests(engine) and change.now < ready_at(engine) + change.policy.unclaimed_s
    )


def had_requests(engine: Engine) -> bool:
    """Somebody was told to go to it, or something seen on it, since it was ready."""
    return engine.in_flight > 0 or max(engine.answered_at, engine.last_used) > ready_at(engine)


def used_at(engine: Engine) -> float:
    """When it was last used, or became ready."""
    return max(engine.last_used, ready_at(engine))


def _order(engine: Engine) -> tuple[float, str]:
    return used_at(engine), engine.id


def least_recent(engines: Iterable[Engine]) -> Engine:
    return min(engines, key=_order)


def victims(candidates: Iterable[Engine], room: Room, need: Need) -> tuple[Engine, ...] | None:
    """The fewest of one node's evictable engines without which ``need`` fits into ``room``, or ``None``.

    (1) take the least recently used until it fits; (2) spare, most recent first, those that it fits without.
    """
    chosen: list[Engine] = []
    for engine in sorted(candidates, key=_order):
        if room.devices(need) is not None:
            break
        chosen.append(engine)  # (1)
        room = room.add(engine.gpus, engine.memory_mib)
    if room.devices(need) is None:
        return None
    for engine in reversed(tuple(chosen)):
        without = room.add(engine.gpus, -engine.memory_mib)
        if without.devices(need) is not None:  # (2)
            chosen.remove(engine)
            room = without
    return tuple(chosen)


def cost(chosen: tuple[Engine, ...]) -> tuple[float, int]:
    """Of several nodes' victims those are the cheapest whose most recently used was used longest ago."""
    return max(used_at(engine) for engine in chosen), len(chosen)
