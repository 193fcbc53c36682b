"""Effects -> edge, agents, waiters. Starts them in order, never awaits in the controller's loop; outcomes are events.

Commands that must stay in order share one lane: the route commands of one slot, the creation and end of one node's
agent. The name, slot and key tables are kept as desired state, and sent to the edge until it has them; a route is
opened only then, so that a name never leads to an engine with another key. An unreachable edge is retried for a while.
A refusal is not retried: the edge would refuse again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Mapping

from gateway_plugin.catalog import Model
from gateway_plugin.edge.runtime import EdgeRuntime
from gateway_plugin.errors import EdgeAway, GatewayError
from serve.controller.agents import Agents
from serve.controller.lanes import Lanes
from serve.core import effects as ef
from serve.core.events import Event, RouteClosed, RouteDrained, RouteOpened, RouteRefused

log = logging.getLogger("gateway.controller")

_EDGE_PATIENCE_S = 30.0
_OPEN_PATIENCE_S = 2.0
_EDGE_RETRY_S = 0.2
_REFUSED_RETRY_S = 2.0
_ROUTE_UP_S = 10.0
_ROUTE_POLL_S = 0.02
_VERBS: Mapping[type[ef.Effect], str] = {ef.StopEngine: "stop", ef.SleepEngine: "sleep", ef.WakeEngine: "wake"}


class Performer:
    """Performs the effects of ``step``."""

    def __init__(
        self,
        edge: EdgeRuntime,
        agents: Agents,
        post: Callable[[Event], None],
        answer: Callable[[ef.Answer], None],
        fetch: Callable[[Model], None] = lambda model: None,
    ) -> None:
        self._fetch = fetch
        self._edge = edge
        self._agents = agents
        self._post = post
        self._answer = answer
        self._lanes = Lanes()
        self._names: tuple[Mapping[str, int], frozenset[str]] | None = None
        """Desired state still to be sent to the edge: name or alias -> slot, and which names are kept apart."""
        self._told = asyncio.Event()
        """Set while the edge has all names and keys."""
        self._told.set()
        self._news = asyncio.Event()

    def start_all(self, effects: tuple[ef.Effect, ...]) -> None:
        """Answer waiters now, start the rest."""
        for effect in effects:
            if isinstance(effect, ef.Answer):
                self._answer(effect)
            else:
                log.info(type(effect).__name__, extra=fields(effect))
                self._start(effect)

    async def run(self) -> None:
        """Send names and keys of the slots to the edge on every change, until it has them; runs without end."""
        while True:
            await self._news.wait()
            self._news.clear()
            error = await self._asked_again(self._tell_names, None)
            if error is not None:
                log.error("edge-refused", extra={"command": "sync-slots", "error": error})
                await asyncio.sleep(_REFUSED_RETRY_S)
                self._news.set()
            elif not self._news.is_set():
                self._told.set()

    async def _tell_names(self) -> None:
        if self._names is not None:
            names, apart = self._names
            await self._edge.sync_slots(names, (), apart)

    def _start(self, effect: ef.Effect) -> None:
        match effect:
            case ef.SyncSlots(names, fresh, apart):
                self._edge.renew_keys(fresh)  # at once: an engine may be started with its key before the edge has it
                self._names = (names, apart)
                self._told.clear()
                self._news.set()
            case ef.OpenRoute(slot=slot) | ef.DrainRoute(slot=slot) | ef.CloseRoute(slot=slot):
                self._lanes.add(("slot", slot), lambda: self._route(effect))
            case ef.StartEngine():
                self._lanes.beside(lambda: self._start_engine(effect))
            case ef.StopEngine(node=node) | ef.SleepEngine(node=node) | ef.WakeEngine(node=node):
                self._lanes.beside(lambda: self._agents.command(node, _VERBS[type(effect)], effect))
            case ef.CreateAgent(node, kind, block):
                self._lanes.add(("node", node), lambda: self._agents.create(node, kind, block))
            case ef.FetchWeights(model):
                self._fetch(model)
            case ef.KillAgent(node, block_goes):
                self._lanes.add(("node", node), lambda: self._agents.end(node, block_goes))

    async def _start_engine(self, effect: ef.StartEngine) -> None:
        await self._agents.command(effect.node, "start", effect, self._edge.slot_key(effect.slot))

    async def _route(self, effect: ef.OpenRoute | ef.DrainRoute | ef.CloseRoute) -> None:
        engine, slot, server = effect.engine, effect.slot, effect.server
        match effect:
            case ef.OpenRoute():
                error = await self._asked_again(lambda: self._open(effect), _OPEN_PATIENCE_S)
                if error is None:
                    self._lanes.beside(lambda: self._until_up(effect))
            case ef.DrainRoute():
                error = await self._asked_again(lambda: self._edge.drain(slot, server), _EDGE_PATIENCE_S)
                if error is None:
                    self._post(RouteDrained(engine))
            case ef.CloseRoute():
                error = await self._asked_again(lambda: self._edge.close(slot, server), _EDGE_PATIENCE_S)
                if error is None:
                    self._post(RouteClosed(engine))
        if error is not None:
            log.warning("edge-refused", extra={"command": type(effect).__name__, "error": error, "engine": engine})
            self._post(RouteRefused(engine, error))

    async def _open(self, effect: ef.OpenRoute) -> None:
        try:
            await asyncio.wait_for(self._told.wait(), _OPEN_PATIENCE_S)
        except TimeoutError:
            raise EdgeAway("The edge does not have the names and keys of its slots yet.") from None
        await self._edge.open(effect.slot, effect.server, effect.address, effect.limit)

    async def _until_up(self, effect: ef.OpenRoute) -> None:
        """Waiters are released only after the edge itself reports the server UP."""
        deadline = asyncio.get_running_loop().time() + _ROUTE_UP_S
        while asyncio.get_running_loop().time() < deadline:
            try:
                found = await self._edge.servers((effect.slot,))
            except (OSError, GatewayError):
                found = ()
            for server in found:
                if server.server == effect.server and server.address == effect.address and server.up:
                    self._post(RouteOpened(effect.engine))
                    return
            await asyncio.sleep(_ROUTE_POLL_S)
        self._post(RouteRefused(effect.engine, f"the edge did not report it up within {_ROUTE_UP_S:.0f} s"))

    async def _asked_again(self, command: Callable[[], Awaitable[None]], patience_s: float | None) -> str | None:
        """``None`` when the edge accepted it, else its error: a refusal at once, no connection after ``patience_s``
        (``None``: never). An edge that restarts is back within a second or two."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            try:
                await command()
            except EdgeAway as error:
                if patience_s is not None and loop.time() >= began + patience_s:
                    return error.message
                await asyncio.sleep(_EDGE_RETRY_S)
            except (OSError, GatewayError) as error:
                return str(error) or type(error).__name__
            else:
                return None


def fields(effect: ef.Effect) -> dict[str, object]:
    """An effect's log entry. A model only by name: its environment may hold secrets."""
    shown = {item.name: getattr(effect, item.name) for item in dataclasses.fields(effect)}
    return {name: value.name if isinstance(value, Model) else value for name, value in shown.items()}
