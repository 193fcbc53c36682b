"""The controller: a mailbox, one loop, the only writer of the fleet. A Serve deployment with exactly one replica."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections import defaultdict, deque
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from gateway_plugin.blocks.stop_files import CancelRequests
from gateway_plugin.catalog import parse_catalog
from gateway_plugin.clock import SteadyClock
from gateway_plugin.edge.runtime import EdgeRuntime
from gateway_plugin.errors import GatewayError, ModelNotFound, NotFound, ServiceError
from gateway_plugin.files import Copies, why_unwritten, write_private
from gateway_plugin.logs import log_events
from gateway_plugin.paths import Layout
from serve.controller.adapters import adapt_engines, give_back
from serve.controller.agents import Agents, MakeAgent, agents_alive
from serve.controller.blocks import LedgerWatch
from serve.controller.calls import Calls
from serve.controller.catalogs import catalog_in_force
from serve.controller.fence import become_the_only_one
from serve.controller.journal import Journal
from serve.controller.memory import Memory
from serve.controller.metrics import Metrics
from serve.controller.model_cards import ModelCards
from serve.controller.observer import Observer, edge_as_it_is
from serve.controller.performer import Performer
from serve.controller.weights import UNWATCHED, WeightsPlace, WeightsWatch
from serve.core import events as ev
from serve.core.handlers.engines import died_in_service
from serve.core.policy import Policy
from serve.core.replay import digest, new_decisions
from serve.core.state import Fleet
from serve.core.step import initial, step
from serve.core.views.blocks import blocks_view
from serve.core.views.status import models_view, outlook_view, status_view
from serve.core.views.why import why_view
from serve.core.weighing import weighing

log = logging.getLogger("gateway.controller")

_UNNAMED = ev.Requester()
_TICK_S = 0.25
_DEATHS_KEPT = 8
_COPIES_S = 1.0
"""Interval of retries of failed writes."""


class Controller:
    """Decides which models are loaded where and which routes are open."""

    def __init__(
        self, state: str, policy: Policy, make_agent: MakeAgent, clock: SteadyClock | None = None,
        weights: WeightsPlace = UNWATCHED,
    ) -> None:  # fmt: skip
        self._clock = clock or SteadyClock()
        self._layout = Layout.of(Path(state))
        log_events("gateway.controller", self._layout.controller_log)
        self.fleet: Fleet = initial(policy)
        self._mailbox: asyncio.Queue[ev.Event] = asyncio.Queue()
        self._calls = Calls()
        self._deaths: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_DEATHS_KEPT))
        self._copies = Copies()
        self._journal = Journal(self._layout.controller, self._copies)
        self._memory = Memory(self._journal, self._clock, lambda: self.fleet)
        self._cards = ModelCards(self._journal)
        self._metrics = Metrics()
        self._edge = EdgeRuntime(self._layout, self._copies)
        self._agents = Agents(policy.node_types, make_agent, self.post, self._clock)
        self._weights = WeightsWatch(self, self.post, weights)
        self._performer = Performer(self._edge, self._agents, self.post, self._calls.answer, self._weights.fetch)
        self._observer = Observer(
            self._edge, self, self.post, self._performer.start_all, self._clock.now, self._agents.still
        )
        self._ledger = LedgerWatch(self._layout, self.post, self._clock)
        self._cancels = CancelRequests(self._layout.block_cancels)
        self._catalog_pins: frozenset[str] = frozenset()
        self._tasks: list[asyncio.Task[None]] = []
        self._begun = asyncio.Event()
        self._applying = asyncio.Lock()
        self._spawn(self._begin(), "begin")

    # --- the loop -------------------------------------------------------------------------------------------------

    def post(self, event: ev.Event) -> None:
        """Post an event: the only way in."""
        self._mailbox.put_nowait(event)

    async def _run(self) -> None:
        raised: ev.Event | None = None
        while True:
            event = raised or await self._mailbox.get()  # else it would undo another catalog that waits in the mailbox
            now = self._clock.now()
            before = self.fleet
            self._metrics.count(before, event)
            if (model := died_in_service(before, event)) is not None:
                self._deaths[model].append(now)
            raised = self._cards.note(before, event, self._clock.wall(now))
            try:
                self.fleet, effects = step(before, event, now)
            except Exception:
                self._journal.record(event, now, before)
                raise
            self._performer.start_all(effects)
            self._metrics.count_decisions(decisions := new_decisions(before, self.fleet))
            did = digest(effects, decisions)
            self._journal.record(event, now, before, did, news=bool(effects) or self.fleet != before)
            if self.fleet.pinned != before.pinned:
                pinned, of_catalog = self.fleet.pinned, self._catalog_pins
                self._journal.keep_pins(pinned - of_catalog, of_catalog - pinned)

    async def _keep_copies(self) -> None:
        """Retry failed writes as soon as there is room; report to the fleet whether there is."""
        while True:
            await asyncio.sleep(_COPIES_S)
            await asyncio.to_thread(self._copies.retry)
            if (trouble := self._copies.trouble) != self.fleet.storage:
                log.warning("storage", extra={"trouble": trouble, "unwritten": self._copies.unwritten})
                self.post(ev.StorageSeen(trouble))

    async def _begin(self) -> None:
        """Read the present state of edge and agents, then start the loop with it."""
        self._lock = await asyncio.to_thread(become_the_only_one, self._layout.controller_lock)
        catalog = catalog_in_force(self._layout)
        slots, apart, servers = await edge_as_it_is(self._edge, catalog)
        nodes = await asyncio.to_thread(agents_alive)
        pinned, unpinned = self._journal.pins()
        self._catalog_pins = frozenset(model.name for model in catalog.models if model.pinned)
        self.fleet = initial(self.fleet.policy, self._memory.read())
        self.post(ev.CatalogChanged(catalog.models))
        epoch = self._journal.next_epoch(self._clock.wall(self._clock.now()))
        self.post(ev.Started(epoch, slots, servers, nodes, pinned, apart))
        for name in unpinned & self._catalog_pins:
            self.post(ev.PinChanged(name, pinned=False))
        for node in nodes:
            await self._agents.find(node)
        self._spawn(self._run(), "loop")
        self._spawn(self._performer.run(), "performer")
        self._spawn(self._observer.watch_all(), "observer")
        self._spawn(self._observer.watch_closely(), "observer-closely")
        self._spawn(self._ledger.watch(), "ledger")
        self._spawn(self._keep_copies(), "copies")
        self._spawn(self._weights.watch(), "weights")
        self._spawn(self._memory.keep(), "memory")
        self._spawn(self._tick(), "tick")
        self._begun.set()
        log.info("controller-started", extra={"nodes": nodes, "servers": len(servers)})

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.post(ev.Tick())

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._tasks.append(asyncio.create_task(work, name=name))

    def check_health(self) -> None:
        """Serve's health check; a controller whose loop has ended must be replaced."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and task.exception() is not None:
                log.critical("controller-broken", exc_info=task.exception(), extra={"task": task.get_name()})
                raise RuntimeError(f"the controller's {task.get_name()} ended") from task.exception()

    # --- methods, called by the ingress ---------------------------------------------------------------------------

    async def acquire(
        self,
        ticket: str,
        model: str,
        wait_s: float,
        not_routed: bool,
        unattended: bool,
        requester: ev.Requester = _UNNAMED,
        deadline_s: float | None = None,
    ) -> GatewayError | None:
        """Wait until requests for ``model`` may be sent (``None``), or until the reason why not is known.

        A caller that disconnects cancels this call, and its wait. An ingress of an earlier version passes no
        ``requester`` and no ``deadline_s``.
        """
        await self._begun.wait()
        future = self._calls.open(ticket)
        self.post(ev.Acquire(ticket, model, wait_s, not_routed, unattended, requester, deadline_s))
        try:
            return await future
        except asyncio.CancelledError:
            self._calls.forget(ticket)
            self.post(ev.WaiterLeft(ticket))
            raise

    async def outlook(self, model: str) -> dict[str, Any]:
        """``outlook_view`` of a model, and ``deaths``: when its engines last died; ``apart_since``: since when without
        a break all of its requests go through the ingress. Both by the wall clock."""
        found = outlook_view(self.fleet, model, self._clock.now())
        since = found["apart_since"]
        apart_since = None if since is None else self._clock.wall(since)
        deaths = [self._clock.wall(at) for at in self._deaths.get(found["name"], ())]
        return {**found, "apart_since": apart_since, "deaths": deaths}

    async def answered(self, model: str) -> None:
        """An engine of this model has answered a request, the first since one died."""
        self.post(ev.ModelAnswered(model))

    async def suspects(self, model: str) -> None:
        """The ingress has suspects of this model, or remembers a culprit; repeated while that is so."""
        self.post(ev.SuspectsKept(model))

    async def ready(self) -> dict[str, Any]:
        """``{"ready": BOOL, "trouble": TEXT}``: whether the loop runs and agents and edge have reported; and the
        present problem, if there is one."""
        ready = {"ready": self._begun.is_set() and self.fleet.settled}
        return {**ready, "trouble": self.fleet.storage} if self.fleet.storage else ready

    async def models(self, detail: bool) -> list[dict[str, Any]]:
        """Every model with its state; ``detail``: for an administrator."""
        entries = models_view(self.fleet, self._clock.now(), detail=detail)
        return [{**entry, **self._cards.shown(entry["id"], detail=detail)} for entry in entries]

    async def why(self, model: str) -> dict[str, Any] | GatewayError:
        """Why a model is as it is, and what would change it."""
        name = self.fleet.names.get(model)
        if name is None:
            return ModelNotFound(model, tuple(sorted(self.fleet.models)))
        return why_view(self.fleet, name, self._clock.now(), weighing)

    async def status(self) -> dict[str, Any]:
        """The whole status."""
        return {
            **status_view(self.fleet, self._clock.now()),
            "edge_reachable": self._observer.reachable,
            "unwritten": list(self._copies.unwritten),
            "pid": os.getpid(),
        }

    async def blocks(self, ended: bool) -> list[dict[str, Any]]:
        """Blocks that hold a place with their nodes; with ``ended`` also the latest that ended."""
        return blocks_view(self.fleet, self._clock.now(), ended)

    async def metrics(self) -> bytes:
        """Prometheus text."""
        return self._metrics.text(self.fleet, self._observer.requests, self._clock.now())

    async def administer(self, verb: str, model: str) -> GatewayError | None:
        """``load``, ``unload``, ``pin`` or ``unpin``. Returns the reason of a refusal, or ``None``."""
        name = self.fleet.names.get(model)
        if name is None:
            return ModelNotFound(model, tuple(sorted(self.fleet.models)))
        events: dict[str, ev.Event] = {
            "load": ev.LoadAsked(name),
            "unload": ev.UnloadAsked(name),
            "pin": ev.PinChanged(name, pinned=True),
            "unpin": ev.PinChanged(name, pinned=False),
        }
        self.post(events[verb])
        return None

    async def refuse_waiters(self) -> None:
        """The gateway is shutting down: refuse all waiters."""
        self.post(ev.GatewayCloses())
        await self._memory.write()

    async def apply(self, document: object) -> GatewayError | None:
        """Apply another catalog. Returns the reason of a refusal, or ``None``; it is kept for the next controller.

        It goes on without its caller: engines that have taken its adapters must not be left with them alone.
        """
        return await asyncio.shield(asyncio.create_task(self._apply(document)))

    async def _apply(self, document: object) -> GatewayError | None:
        try:
            catalog = parse_catalog(document, "catalog")
            async with self._applying:
                adapted = await adapt_engines(self.fleet, catalog.models, self._agents.call)
                try:
                    await asyncio.to_thread(write_private, self._layout.catalog_json, json.dumps(document))
                except OSError:
                    await give_back(self.fleet, catalog.models, self._agents.call)
                    raise
                self._catalog_pins = frozenset(model.name for model in catalog.models if model.pinned)
                self.post(ev.CatalogChanged(catalog.models, adapted))
        except GatewayError as error:
            return error
        except OSError as error:  # refused: the next controller would silently lose it
            return ServiceError(f"The catalog was not changed: {why_unwritten(error)}.")
        return None

    async def drain_block(self, block: str) -> GatewayError | None:
        """Give a block (or node) back once its engines are drained."""
        for node in self.fleet.nodes.values():
            if block in (node.block, node.id):
                self.post(ev.NodeDrainAsked(node.id))
                return None
        return NotFound(f"No block with a node is called '{block}'; see 'gateway blocks list'.")

    async def cancel_block(self, block: str) -> GatewayError | None:
        """Have a block ended at once, in the queue or running. Returns the reason of a refusal, or ``None``."""
        found = self.fleet.blocks.get(block)
        if found is None:
            return NotFound(f"No block is called '{block}'; see 'gateway blocks list'.")
        if found.phase.ended:
            return NotFound(f"The block '{block}' has ended already ({found.phase}).")
        try:
            await asyncio.to_thread(self._cancels.ask, block)
        except OSError as error:
            return ServiceError(f"The request to end '{block}' could not be written: {error}")
        self.post(ev.BlockCancelAsked(block))
        return None

    async def retry_blocks(self, kind: str) -> GatewayError | None:
        """Request blocks of this type again, ignoring earlier failures."""
        known = [one.name for one in self.fleet.policy.node_types]
        if kind not in known:
            return NotFound(f"The site has no node type {kind!r}; it has: {', '.join(known)}.")
        self.post(ev.NodeTypeRetryAsked(kind))
        return None
