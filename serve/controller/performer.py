"""Effects -> edge, agents, waiters. Starts them in order, never awaits in the controller's loop; outcomes are events.

Commands to the edge and to agents go through one ordered queue, because their order matters (a slot's new key before
the engine that carries it; a drain before the stop). The edge may be away for a moment: it is asked again until it took
the command, and comes back from disk with everything it had taken before.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from gateway_plugin.catalog import Model
from gateway_plugin.edge.runtime import EdgeRuntime
from gateway_plugin.errors import GatewayError
from serve.controller.agents import Agents
from serve.core.effects import (
    Answer,
    CloseRoute,
    CreateAgent,
    DrainRoute,
    Effect,
    KillAgent,
    OpenRoute,
    StartEngine,
    StopEngine,
    SyncSlots,
)
from serve.core.events import Event, RouteClosed, RouteDrained, RouteOpened, RouteRefused

log = logging.getLogger("gateway.controller")

_EDGE_PATIENCE_S = 30.0
_EDGE_RETRY_S = 0.2
_ROUTE_UP_S = 10.0
_ROUTE_POLL_S = 0.02


class Performer:
    """Performs what ``step`` decided."""

    def __init__(
        self,
        edge: EdgeRuntime,
        agents: Agents,
        post: Callable[[Event], None],
        answer: Callable[[Answer], None],
    ) -> None:
        self._edge = edge
        self._agents = agents
        self._post = post
        self._answer = answer
        self._queue: asyncio.Queue[Effect] = asyncio.Queue()
        self._background: set[asyncio.Task[None]] = set()

    def start_all(self, effects: tuple[Effect, ...]) -> None:
        """Answer waiters now, queue the rest."""
        for effect in effects:
            if isinstance(effect, Answer):
                self._answer(effect)
            else:
                log.info(type(effect).__name__, extra=fields(effect))
                self._queue.put_nowait(effect)

    async def run(self) -> None:
        """Perform queued effects for ever."""
        while True:
            await self._perform(await self._queue.get())

    async def _perform(self, effect: Effect) -> None:
        match effect:
            case SyncSlots(names, fresh, apart):
                await self._at_the_edge(lambda: self._edge.sync_slots(names, fresh, apart), "sync-slots")
            case OpenRoute(engine, slot, server, address):
                error = await self._at_the_edge(lambda: self._edge.open(slot, server, address), "open", patient=False)
                if error is not None:
                    self._post(RouteRefused(engine, error))
                else:
                    self._spawn(self._until_up(effect))
            case DrainRoute(engine, slot, server):
                error = await self._at_the_edge(lambda: self._edge.drain(slot, server), "drain")
                self._post(RouteDrained(engine) if error is None else RouteRefused(engine, error))
            case CloseRoute(engine, slot, server):
                error = await self._at_the_edge(lambda: self._edge.close(slot, server), "close")
                self._post(RouteClosed(engine) if error is None else RouteRefused(engine, error))
            case StartEngine(node=node, slot=slot):
                self._spawn(self._agents.command(node, "start", effect, self._edge.slot_key(slot)))
            case StopEngine(node=node):
                self._spawn(self._agents.command(node, "stop", effect))
            case CreateAgent(node, kind, block):
                self._agents.create(node, kind, block)
            case KillAgent(node, block_goes):
                self._spawn(self._agents.end(node, block_goes))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("effect-failed", exc_info=task.exception())

    async def _until_up(self, effect: OpenRoute) -> None:
        """Waiters go only after the edge itself reports the server UP."""
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

    async def _at_the_edge(
        self, command: Callable[[], Awaitable[None]], what: str, *, patient: bool = True
    ) -> str | None:
        """``None`` when the edge took it, else its last words. A restarting edge is back within a second or two."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (_EDGE_PATIENCE_S if patient else 2.0)
        while True:
            try:
                await command()
            except (OSError, GatewayError) as error:
                if loop.time() >= deadline:
                    log.exception("edge-refused", extra={"command": what})
                    return str(error) or type(error).__name__
                await asyncio.sleep(_EDGE_RETRY_S)
            else:
                return None


def fields(effect: Effect) -> dict[str, object]:
    """What the log says of an effect. A model only by name: its environment may hold secrets."""
    shown = {item.name: getattr(effect, item.name) for item in dataclasses.fields(effect)}
    return {name: value.name if isinstance(value, Model) else value for name, value in shown.items()}
