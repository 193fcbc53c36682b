"""Builders: models, policies and fleets in a given state, reached by real events.

``Story`` plays the agents and the edge by hand: it keeps the fleet, the clock and every effect, and has one verb for
each thing that can happen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from gateway_plugin.catalog import Model
from gateway_plugin.phases import BlockPhase
from serve.core import events as ev
from serve.core.effects import Answer, Effect, OpenRoute, StartEngine
from serve.core.policy import NodeTypeSpec, Policy
from serve.core.state import Engine, Fleet
from serve.core.step import initial, step

E = TypeVar("E", bound=Effect)

GIB = 1024


def a_model(name: str, memory_gib: float = 4, **fields: Any) -> Model:
    """A model in host memory unless ``gpus`` is set."""
    return Model(name=name, source="prepared:x", memory_gib=memory_gib, **fields)


def a_kind(
    name: str = "cpu", host_gib: int = 6, gpus: tuple[int, ...] = (), least: int = 0, most: int = 1
) -> NodeTypeSpec:
    """``gpus``: GiB of each."""
    return NodeTypeSpec(name, host_gib * GIB, tuple(gib * GIB for gib in gpus), least, most)


def a_policy(*node_types: NodeTypeSpec, **fields: Any) -> Policy:
    return Policy(node_types=node_types or (a_kind(),), **fields)


def a_block(node: str, starts: float | None = 900.0, ends: float | None = None, **fields: Any) -> ev.SeenBlock:
    """The block of ``node``, running unless ``phase`` is set; requested at 880."""
    phase = BlockPhase(fields.pop("phase", "running"))
    said = {"asked_at": 880.0, "job": "123", "starts_at": starts, "ends_at": ends, **fields}
    return ev.SeenBlock(name=f"block-{node}", type=node.split("-")[0], phase=phase, **said)


@dataclass
class Story:
    """A fleet and what happened to it."""

    fleet: Fleet
    now: float = 1000.0
    effects: tuple[Effect, ...] = ()
    """Of the last event."""
    log: list[tuple[ev.Event, float, tuple[Effect, ...]]] = field(default_factory=list)
    tickets: int = 0

    def on(self, event: ev.Event, after: float = 0.0) -> tuple[Effect, ...]:
        """``event`` comes ``after`` seconds."""
        self.now += after
        self.fleet, self.effects = step(self.fleet, event, self.now)
        self.log.append((event, self.now, self.effects))
        return self.effects

    def tick(self, after: float = 0.0) -> tuple[Effect, ...]:
        return self.on(ev.Tick(), after)

    def did(self) -> tuple[Effect, ...]:
        """All effects of the last event."""
        return self.effects

    def said(self, kind: type[E]) -> tuple[E, ...]:
        """Effects of one type of the last event."""
        return tuple(effect for effect in self.effects if isinstance(effect, kind))

    def ever(self, kind: type[E]) -> tuple[E, ...]:
        """Effects of one type of all events."""
        return tuple(effect for _, _, effects in self.log for effect in effects if isinstance(effect, kind))

    def answers(self) -> dict[str, Answer]:
        """Every answer so far, by ticket."""
        return {answer.ticket: answer for answer in self.ever(Answer)}

    def engine(self, model: str) -> Engine:
        """The newest engine of ``model``."""
        return self.fleet.engines[self.fleet.model_engines[model][-1]]

    # --- requests ---
    def ask(self, model: str, wait_s: float = 600.0, after: float = 0.0, **fields: Any) -> str:
        """A request waits for ``model``; returns its ticket."""
        self.tickets += 1
        ticket = f"t{self.tickets}"
        self.on(ev.Acquire(ticket, model, wait_s, **fields), after)
        return ticket

    # --- nodes ---
    def join(self, node: str = "cpu-0-0", host_gib: int = 6, gpus: tuple[int, ...] = (), **fields: Any) -> None:
        """An agent reports its resources."""
        totals = tuple(gib * GIB for gib in gpus)
        kind = node.split("-")[0]
        self.on(ev.NodeJoined(node, kind, f"block-{node}", "10.0.0.1", host_gib * GIB, totals, **fields))

    def blocks(self, *blocks: ev.SeenBlock, after: float = 0.0) -> None:
        """The ledger was read, with exactly these blocks."""
        self.on(ev.BlocksSeen(blocks), after)

    # --- engines ---
    def got_ready(self, model: str, after: float = 10.0, **fields: Any) -> None:
        """Its process answered a real request."""
        engine = self.engine(model)
        self.on(ev.EngineReady(engine.id, f"10.0.0.1:{engine.id.rpartition('-')[2]}", after, **fields), after)

    def opened(self, model: str, after: float = 0.1) -> None:
        self.on(ev.RouteOpened(self.engine(model).id), after)

    def loaded(self, model: str, **fields: Any) -> None:
        """It loads and its route opens. ``fields``: of ``EngineReady``."""
        assert any(effect.model.name == model for effect in self.ever(StartEngine)), "nobody asked for it"
        self.got_ready(model, **fields)
        assert [effect.engine for effect in self.said(OpenRoute)] == [self.engine(model).id]
        self.opened(model)

    def seen(self, model: str, in_flight: int = 0, up: bool = True, after: float = 0.1, **fields: Any) -> None:
        """The edge's counters; ``read_age_s``: their age."""
        read_at = self.now + after - fields.pop("read_age_s", 0.0)
        seen = ev.ServerSeen(self.engine(model).id, up, in_flight, fields.pop("last_used", 0.0))
        self.on(ev.EdgeSeen((seen,), read_at), after)

    def used(self, model: str, after: float = 0.1) -> None:
        """A request came and went."""
        self.seen(model, in_flight=1, after=after)
        self.seen(model, in_flight=0, after=after)

    def drained(self, model: str, after: float = 0.01) -> None:
        """The edge acknowledges the drain, then reports nothing in flight."""
        self.on(ev.RouteDrained(self.engine(model).id), after)
        self.seen(model, in_flight=0, after=after)

    def exited(self, model: str, reason: str = "exit code 1: boom", expected: bool = False, after: float = 0.5) -> None:
        engine = self.engine(model)
        self.on(ev.EngineExited(engine.id, reason, expected), after)
        self.on(ev.RouteClosed(engine.id))


def begin(*models: Model, policy: Policy | None = None, nodes: tuple[str, ...] = ("cpu-0-0",), **room: Any) -> Story:
    """A settled controller with these models and nodes (``room``: ``host_gib``, ``gpus``), nothing loaded."""
    story = Story(initial(policy or a_policy()))
    story.on(ev.CatalogChanged(models))
    story.on(ev.Started(1, {}, (), nodes))
    for node in nodes:
        story.join(node, **room)
    assert story.fleet.settled
    return story
