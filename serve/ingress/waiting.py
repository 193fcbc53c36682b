"""Waiting for a model: ``acquire`` at the controller, repeated when it restarts, cancelled with its client."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from gateway_plugin.errors import GatewayError, WaitDeadline
from serve.core.events import Requester

log = logging.getLogger("gateway.ingress")

_AGAIN_S = 0.25
_LOOK_S = 2.0
_REASON_MAX = 300
_NEWS_S = 1.0
"""Maximum age of an outlook: all waiters of one model share it."""

UNATTENDED_MAX = 8
"""Models that are waited for on behalf of clients that do not wait (``x-gateway-wait: 0``)."""
UNATTENDED_PER_KEY = 2
"""Of these, on behalf of one key's."""
UNATTENDED_S = 120.0

LOST = (RayError, RayServeException)
"""The controller died, restarts, or cannot be reached yet."""


DEATH_NEWS_S = 1.0
"""Within this time a dead engine is noticed by its agent, and known to the controller and in the edge's map."""


@dataclass(frozen=True)
class History:
    """The controller's record of a model's engines; times are wall-clock seconds."""

    name: str
    """In the catalog."""
    deaths: tuple[float, ...] = ()
    apart_since: float | None = None
    """Since when, without a break until now, the edge hands all of its requests to the ingress."""

    hang_after_s: float | None = None
    """A hanging engine is ended after this time; 0: never. ``None``: not known."""

    def died_in(self, span: tuple[float, float]) -> float | None:
        """When an engine last died in ``span``."""
        return max((death for death in self.deaths if span[0] <= death <= span[1]), default=None)

    def apart_from(self, at: float) -> bool:
        """Whether from ``at`` until now all requests of the model came to its engines through the ingress."""
        return self.apart_since is not None and self.apart_since + DEATH_NEWS_S < at


@dataclass
class Ticket:
    """The ticket under which a request waits at the controller; a new one with each call."""

    number: str = ""


class Waiting:
    """The ingress's side of ``acquire``."""

    def __init__(self, controller: Any, wait_max_s: float) -> None:
        self._controller = controller
        self._wait_max_s = wait_max_s
        self._loads: dict[str, tuple[str, asyncio.Task[None]]] = {}
        """Model -> the key's tag, and the wait."""
        self._news: dict[str, asyncio.Task[dict[str, Any] | None]] = {}
        self._looks: dict[str, asyncio.Task[dict[str, Any] | None]] = {}
        """Model -> the next question about it, not asked yet."""
        self._looking: dict[str, asyncio.Lock] = {}

    def deadline(self, ready_to_wait_s: float | None = None) -> float:
        """Monotonic deadline of a request that came now; ``ready_to_wait_s``: its client's own limit."""
        limit_s = self._wait_max_s if ready_to_wait_s is None else min(self._wait_max_s, ready_to_wait_s)
        return time.monotonic() + limit_s

    def see_it_loaded(self, model: str, requester: Requester) -> None:
        """Wait for ``model`` on behalf of a client that does not wait that long, but will ask again.

        For a while, and for few models at a time, of one key and of all: such a load has a lower priority than all
        that clients wait for.
        """
        of_key = sum(other == requester.key for other, _ in self._loads.values())
        if model not in self._loads and of_key < UNATTENDED_PER_KEY and len(self._loads) < UNATTENDED_MAX:
            task = asyncio.create_task(self._see_it_loaded(model, requester))
            self._loads[model] = (requester.key, task)
            task.add_done_callback(lambda _: self._loads.pop(model, None))

    async def _see_it_loaded(self, model: str, requester: Requester) -> None:
        try:
            await self.acquire(model, self.deadline(UNATTENDED_S), requester, unattended=True)
        except GatewayError as error:
            log.info("not-loaded", extra={"model": model, "code": error.code})

    async def acquire(
        self,
        model: str,
        deadline: float,
        requester: Requester,
        *,
        not_routed: bool = False,
        unattended: bool = False,
        due: float | None = None,
        ticket: Ticket | None = None,
    ) -> None:
        """Wait until ``model`` is ready. Raises the ``GatewayError`` that explains why it will not be.

        The controller is asked at least once: without time to wait it answers with the model's state. ``due``: the
        client's own deadline (monotonic seconds); what is expected later is refused at once. ``ticket``: where the
        present one is noted, for ``outlook``.
        """
        asked = False
        while True:
            left = max(0.0, deadline - time.monotonic())
            if asked and not left:
                raise WaitDeadline(
                    f"The model '{model}' was not ready within the time that this request may wait.",
                    retry_after_s=10.0,
                    state="waiting",
                )
            asked = True
            number = uuid.uuid4().hex
            if ticket is not None:
                ticket.number = number
            due_s = None if due is None else max(0.0, due - time.monotonic())
            response = self._controller.acquire.remote(number, model, left, not_routed, unattended, requester, due_s)
            try:
                error: GatewayError | None = await asyncio.wait_for(response, left + 5.0)
            except asyncio.CancelledError:
                response.cancel()
                raise
            except TimeoutError:
                response.cancel()
                continue
            except BackPressureError:
                await asyncio.sleep(_AGAIN_S)
                continue
            except LOST as lost:
                log.warning("controller-lost", extra={"error": type(lost).__name__})
                await asyncio.sleep(_AGAIN_S)
                continue
            if error is not None:
                raise error
            return

    async def outlook(self, model: str, ticket: Ticket | None = None) -> str:
        """State of a model that is waited for: ``queued: job 7 waits: Resources, position 3, 2 models before it, ready
        in about 40 s``; the position is that of ``ticket``."""
        if model not in self._news:
            self._news[model] = asyncio.create_task(self._ask("outlook", model))
            asyncio.get_running_loop().call_later(_NEWS_S, self._news.pop, model)
        found = await asyncio.shield(self._news[model])
        if found is None:
            return "waiting"
        reason = f": {_one_line(found['reason'])}" if found["reason"] else ""
        expected = f", ready in about {found['eta_s']:.0f} s" if found["eta_s"] is not None else ""
        position = found.get("positions", {}).get(ticket.number) if ticket is not None else None
        place = "" if position is None else f", position {position}"
        if before := found.get("models_before"):
            place += f", {before} model{'s' if before > 1 else ''} before it"
        return f"{found['state']}{reason}{place}{expected}"

    async def history(self, model: str) -> History:
        """The history of the model's engines; empty while the controller is away.

        One query at a time: hundreds of waiters that are released at once share the next one.
        """
        if model not in self._looks:
            self._looks[model] = asyncio.create_task(self._look_in_turn(model))
        found = await asyncio.shield(self._looks[model])
        if found is None:
            return History(model)
        return History(found["name"], tuple(found["deaths"]), found["apart_since"], found["hang_after_s"])

    async def tell(self, verb: Literal["answered", "suspects"], model: str) -> None:
        """Report to the controller that ``model`` answered a request, the first since an engine of it died; or that
        there are suspects of it, or that a culprit is remembered."""
        await self._ask(verb, model)

    async def _look_in_turn(self, model: str) -> dict[str, Any] | None:
        lock = self._looking.setdefault(model, asyncio.Lock())
        async with lock:
            del self._looks[model]  # a caller that comes from here on needs a later answer
            found: dict[str, Any] | None = await self._ask("outlook", model)
        if model not in self._looks:
            self._looking.pop(model, None)
        return found

    async def _ask(self, verb: str, model: str) -> Any:
        """``None``: the controller is away."""
        try:
            return await asyncio.wait_for(getattr(self._controller, verb).remote(model), _LOOK_S)
        except (TimeoutError, *LOST) as error:
            log.warning("controller-away", extra={"error": type(error).__name__})
            return None


def _one_line(text: str) -> str:
    """Text from another program, made fit for one line of a stream of events."""
    return " ".join(text.split())[:_REASON_MAX]
