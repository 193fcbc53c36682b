"""What the edge is told, in which order, and what happens while it is stuck; Ray's calls beside the loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from gateway_plugin.clock import SteadyClock
from gateway_plugin.errors import EdgeAway, EdgeError
from serve.controller.agents import Agents
from serve.controller.observer import Observer
from serve.controller.performer import Performer
from serve.core.effects import CreateAgent, DrainRoute, Effect, KillAgent, OpenRoute, StopEngine, SyncSlots
from serve.core.events import Event, RouteDrained, RouteRefused
from serve.core.policy import NodeTypeSpec, Policy
from serve.core.state import Apart, Fleet
from tests.support.fleets import a_model


class Edge:
    """Notes what it was told; a slot in ``stuck`` does not answer, one in ``refusing`` refuses."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.names: dict[str, int] = {}
        self.kept_apart: frozenset[str] = frozenset()
        self.keys: dict[int, str] = {}
        self.away = False
        self.stuck: set[int] = set()
        self.refusing: set[int] = set()

    def renew_keys(self, fresh: tuple[int, ...]) -> None:
        self.keys |= {slot: f"key-{len(self.keys)}" for slot in fresh}

    def slot_key(self, slot: int) -> str:
        return self.keys[slot]

    async def sync_slots(self, names: Mapping[str, int], _fresh: tuple[int, ...], apart: frozenset[str]) -> None:
        if self.away:
            raise EdgeAway("no answer")
        self.names = dict(names)
        self.kept_apart = apart
        self.told.append(("names", *names))

    async def _change(self, what: str, slot: int) -> None:
        if self.away or slot in self.stuck:
            await asyncio.sleep(0.01)
            raise EdgeAway("no answer")
        self.told.append((what, slot))
        if slot in self.refusing:
            raise EdgeError("refused")

    async def open(self, slot: int, _server: int, _address: str, _limit: int) -> None:
        await self._change("open", slot)

    async def drain(self, slot: int, _server: int) -> None:
        await self._change("drain", slot)

    async def close(self, slot: int, _server: int) -> None:
        await self._change("close", slot)

    async def servers(self, _slots: object = None) -> tuple[()]:
        return ()

    async def tenants(self) -> dict[str, int]:
        return dict(self.names)

    async def apart(self) -> frozenset[str]:
        return self.kept_apart

    async def keys_in_force(self) -> bool:
        return True


class Told:
    """Agents that note what they are told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    async def command(self, node: str, verb: str, *_: object) -> None:
        self.told.append(f"{verb} {node}")

    async def create(self, node: str, *_: object) -> None:
        self.told.append(f"create {node}")

    async def end(self, node: str, *_: object) -> None:
        self.told.append(f"end {node}")


class Stage:
    def __init__(self) -> None:
        self.edge, self.agents = Edge(), Told()
        self.events: list[Event] = []
        edge: Any = self.edge
        agents: Any = self.agents
        self.performer = Performer(edge, agents, self.events.append, lambda answer: None)

    def start(self, *effects: Effect) -> None:
        self.performer.start_all(effects)

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(30.0):
            while not condition():
                await asyncio.sleep(0.005)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    made = Stage()
    running = asyncio.create_task(made.performer.run())
    yield made
    running.cancel()
    for task in made.performer._lanes._tasks:
        task.cancel()


async def test_a_stuck_slot_holds_up_neither_others_nor_the_agents(stage: Stage) -> None:
    stage.edge.stuck.add(1)
    stage.start(DrainRoute("e1", 1, 0), DrainRoute("e2", 2, 0), StopEngine("e3", "n", 1, "x"), CreateAgent("m", "t"))
    await stage.until(lambda: RouteDrained("e2") in stage.events and len(stage.agents.told) == 2)
    assert RouteDrained("e1") not in stage.events
    stage.edge.stuck.clear()
    await stage.until(lambda: RouteDrained("e1") in stage.events)


async def test_commands_of_one_slot_keep_their_order(stage: Stage) -> None:
    stage.edge.stuck.add(1)
    stage.start(DrainRoute("e1", 1, 0), OpenRoute("e2", 1, 1, "127.0.0.1:1"), CreateAgent("m", "t"), KillAgent("m"))
    await asyncio.sleep(0.05)
    stage.edge.stuck.clear()
    await stage.until(lambda: len(stage.edge.told) == 2)
    assert stage.edge.told == [("drain", 1), ("open", 1)]
    assert stage.agents.told == ["create m", "end m"]


async def test_a_refusal_is_told_at_once(stage: Stage) -> None:
    stage.edge.refusing.add(1)
    stage.start(DrainRoute("e1", 1, 0))
    await stage.until(lambda: RouteRefused("e1", "refused") in stage.events)
    assert stage.edge.told == [("drain", 1)]


async def test_a_route_is_opened_only_when_the_edge_has_names_and_keys(stage: Stage) -> None:
    stage.edge.away = True
    stage.start(SyncSlots({"a": 1}, (1,)), OpenRoute("e1", 1, 0, "127.0.0.1:1"))
    assert stage.edge.slot_key(1), "an engine can be started meanwhile"
    await asyncio.sleep(0.3)
    assert stage.edge.told == []
    stage.start(SyncSlots({"a": 1, "b": 2}, (2,)))
    stage.edge.away = False
    await stage.until(lambda: ("open", 1) in stage.edge.told)
    assert {*stage.edge.told[:-1]} == {("names", "a", "b")}


def an_observer(stage: Stage, fleet: Fleet) -> Observer:
    known: Any = SimpleNamespace(fleet=fleet)
    edge: Any = stage.edge
    return Observer(
        edge, known, stage.events.append, stage.performer.start_all, lambda: 1.0, lambda node, engines: None
    )


async def test_names_that_the_edge_lost_are_told_again(stage: Stage) -> None:
    model = a_model("a")
    observer = an_observer(stage, Fleet(Policy(), models={"a": model}, slots={"a": 3}, settled=True))
    await observer._read(None)
    assert stage.edge.names == {}, "once may be a coincidence"
    await observer._read(None)
    await stage.until(lambda: stage.edge.names == dict.fromkeys(model.names, 3))
    for _ in range(3):
        await observer._read(None)
    await asyncio.sleep(0.05)
    assert len(stage.edge.told) == 1


@pytest.mark.parametrize("apart", [True, False])
async def test_models_kept_apart_are_told_again_where_the_edge_has_others(stage: Stage, apart: bool) -> None:
    model = a_model("a")
    kept = {"a": Apart(0.0, 9.0)} if apart else {}
    observer = an_observer(stage, Fleet(Policy(), models={"a": model}, slots={"a": 3}, apart=kept, settled=True))
    stage.edge.names = dict.fromkeys(model.names, 3)
    stage.edge.kept_apart = frozenset() if apart else frozenset(model.names)
    for _ in range(5):
        await observer._read(None)
        await asyncio.sleep(0.02)
    assert stage.edge.kept_apart == (frozenset(model.names) if apart else frozenset())
    assert stage.edge.told == [("names", *model.names)]


async def test_the_loop_goes_on_while_rays_head_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()

    def blocks(*_: object, **__: object) -> None:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(30)  # as long as the loop needs for a turn
        raise ValueError("no such actor")

    def takes_it(_class: object) -> object:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=blocks))

    monkeypatch.setattr("ray.get_actor", blocks)
    monkeypatch.setattr("ray.kill", blocks)
    monkeypatch.setattr("ray.remote", takes_it)
    events: list[Event] = []
    kind = NodeTypeSpec("t", 1, (), 0, 1)
    agents = Agents((kind,), lambda node, kind: (object, ()), events.append, SteadyClock())
    await asyncio.gather(agents.find("n"), agents.create("m", "t", ""), agents.end("o", block_goes=False))
    assert len(events) == 2
