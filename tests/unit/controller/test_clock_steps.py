"""The whole controller with a node agent and fake engines, no Ray and no edge: it switches models though the wall clock
is set. Every process is this one's own or a fake engine."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gateway_plugin.clock import SteadyClock
from gateway_plugin.edge.runtime import ServerStat
from gateway_plugin.files import Copies
from gateway_plugin.paths import Layout
from serve.agent.actor import AgentSettings, NodeAgent
from serve.controller import deployment
from serve.controller.deployment import Controller
from serve.core.events import Requester
from serve.core.policy import NodeTypeSpec, Policy
from tests.support.agents import KEY, QUICK, fake_model, private_layout
from tests.support.clocks import set_clock

pytestmark = pytest.mark.process

KIND = NodeTypeSpec("local", host_mib=1024, gpu_mib=(), min_nodes=1, max_nodes=1)
"""Room for one model."""


class Edge:
    """Routes as the edge keeps them; nothing is ever in flight."""

    def __init__(self, _layout: Layout, _copies: Copies) -> None:
        self.routes: dict[tuple[int, int], tuple[str, bool]] = {}
        self.limits: dict[tuple[int, int], int] = {}
        self.names: dict[str, int] = {}

    async def apart(self) -> frozenset[str]:
        return frozenset()

    async def tenants(self) -> dict[str, int]:
        return dict(self.names)

    async def servers(self, slots: tuple[int, ...] | None = None) -> tuple[ServerStat, ...]:
        return tuple(
            ServerStat(slot, server, address, not draining, draining, 0, 1.0, 0, limit=self.limits[slot, server])
            for (slot, server), (address, draining) in self.routes.items()
            if slots is None or slot in slots
        )

    async def adopt_keys(self) -> None:
        """There are none."""

    def renew_keys(self, _fresh: tuple[int, ...]) -> None:
        """All engines have the same key."""

    async def keys_in_force(self) -> bool:
        return True

    async def sync_slots(self, names: dict[str, int], _fresh: tuple[int, ...], _apart: frozenset[str]) -> None:
        self.names = dict(names)

    async def open(self, slot: int, server: int, address: str, limit: int) -> None:
        self.routes[slot, server] = (address, False)
        self.limits[slot, server] = limit

    async def drain(self, slot: int, server: int) -> None:
        self.routes[slot, server] = (self.routes[slot, server][0], True)

    async def close(self, slot: int, server: int) -> None:
        self.routes.pop((slot, server), None)

    def slot_key(self, _slot: int) -> str:
        return KEY


class Handle:
    """As Ray's handle of an agent that lives here."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent

    def __getattr__(self, verb: str) -> Any:
        return SimpleNamespace(remote=lambda *given: asyncio.ensure_future(getattr(self.agent, verb)(*given)))


class Agent(NodeAgent):
    """With the time limits of tests."""

    def __init__(self, settings: AgentSettings) -> None:
        super().__init__(settings, QUICK)

    async def ray_node(self) -> str:
        return "here"


@pytest.fixture
def layout() -> Iterator[Layout]:
    with private_layout() as made:
        entries = {
            name: fake_model(name, min_residency_s=0).model_dump(mode="json", exclude={"name"}) for name in ("a", "b")
        }
        made.catalog_json.write_text(json.dumps({"models": entries}))
        yield made


@pytest.fixture
async def controller(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Controller]:
    handles: list[Handle] = []

    def made(agent: type[Agent]) -> Any:
        def here(*given: Any) -> Handle:
            handles.append(Handle(agent(*given)))
            return handles[-1]

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=here))

    monkeypatch.setattr("ray.remote", made)
    monkeypatch.setattr(deployment, "agents_alive", lambda: ())
    monkeypatch.setattr(deployment, "EdgeRuntime", Edge)

    def make_agent(node: str, kind: NodeTypeSpec) -> tuple[type[Any], tuple[Any, ...]]:
        state = str(layout.state)
        return Agent, (AgentSettings(node, kind.name, state, kind.host_mib, (), on_loopback=True, isolate="off"),)

    policy = Policy(node_types=(KIND,), first_use_grace_s=0.1)
    running = Controller(str(layout.state), policy, make_agent, SteadyClock(lambda: time.time(), time.monotonic))
    yield running
    for handle in handles:
        await handle.agent.shutdown()
    for task in running._tasks:
        task.cancel()
    await asyncio.gather(*running._tasks, return_exceptions=True)


async def switch(controller: Controller, model: str) -> None:
    """Have ``model`` loaded, and nothing else."""
    error = await asyncio.wait_for(
        controller.acquire(secrets.token_hex(4), model, 60.0, False, False, Requester()), 75.0
    )
    assert error is None, f"{model}: {error}"
    ready = [engine.model for engine in controller.fleet.engines.values() if engine.state.value == "ready"]
    assert ready == [model]


async def test_models_are_switched_after_every_step_of_the_clock(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    await switch(controller, "a")
    for step_s in (3, 3600, -3600):  # against the real clock: from one to the next it is set by up to two hours
        set_clock(monkeypatch, step_s)
        for model in ("b", "a"):
            await switch(controller, model)
    (kept,) = (engine for engine in controller.fleet.engines.values())
    assert 0 <= controller._clock.now() - kept.started < 30


async def test_who_waits_is_not_refused_and_the_load_not_ended_when_the_clock_is_set(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    await switch(controller, "a")
    waiting = asyncio.create_task(switch(controller, "b"))
    while not any(engine.model == "b" for engine in controller.fleet.engines.values()):
        await asyncio.sleep(0.01)
    (before,) = (engine.id for engine in controller.fleet.engines.values() if engine.model == "b")
    set_clock(monkeypatch, 3600)
    await waiting
    assert [engine.id for engine in controller.fleet.engines.values()] == [before]
