"""A cold request: wait for its model, send it back through the edge, pass the answer on.

The edge sends a request here when no engine could take it: the model is cold, or its engine died before the first byte.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway_plugin.errors import DeadlineTooEarly, GatewayError, InvalidRequest, NotRouted
from gateway_plugin.passing import AROUND, FORMS, FOUND_MODEL, PRIORITY
from serve.core.events import Priority, Requester
from serve.ingress.boarding import Boarding, Seat
from serve.ingress.body import Ask, Turns, read_bounded
from serve.ingress.budget import TAG, Budget
from serve.ingress.relay import CALLER, Relay, is_not_routed, response_headers
from serve.ingress.waiting import DEATH_NEWS_S, Ticket, Waiting

log = logging.getLogger("gateway.ingress")

KEEP_ALIVE_S = 10.0
"""A streaming client that waits longer receives SSE comments from here on."""

_STREAM_SOUND = ("/v1/audio/speech",)
"""What they stream need be no SSE: comments before it would spoil the sound."""
_DEADLINE = re.compile(r"[0-9]{1,6}(\.[0-9]{1,3})?", re.ASCII)
_NOT_ROUTED_MAX = 3
_BACK_OFF_S = 0.2
_ERROR_BYTES = 64 << 10
_ERROR_S = 5.0


class StreamBroken(ConnectionError):
    """The engine broke off within an answer; the transfer must break off too, visibly."""


@dataclass(frozen=True)
class Errand:
    """One request: its body, target, arrival and deadline."""

    ask: Ask
    method: str
    target: str
    headers: Mapping[str, str]
    requester: Requester
    arrived: float
    """Wall-clock seconds at which the edge took it."""
    deadline: float
    """Monotonic seconds."""
    due: float | None = None
    """The client's own deadline (``x-gateway-deadline-s``), monotonic seconds; ``None`` without one."""
    ticket: Ticket = field(default_factory=Ticket)
    seats: list[Seat] = field(default_factory=list)
    """Its seat among the requests of its model, once it has one."""

    def leave(self) -> None:
        """Release its seat."""
        for seat in self.seats:
            seat.leave()


class Inference:
    """Handles every inference path."""

    def __init__(self, waiting: Waiting, relay: Relay, body_bytes_max: int, budget: Budget) -> None:
        self._waiting = waiting
        self._relay = relay
        self._body_bytes_max = body_bytes_max
        self._budget = budget
        self._turns = Turns()
        self._boarding = Boarding(waiting)

    async def handle(self, request: Request) -> Response:
        """Answer one request. Raises ``GatewayError`` before the first byte is sent."""
        patience_s = ready_to_wait_s(request.headers)
        deadline = self._waiting.deadline(patience_s)
        within_s = deadline_s(request.headers)
        due = None if within_s is None else time.monotonic() + within_s
        requester = requester_of(request.headers)
        hold = self._budget.hold(requester.key)
        try:
            body = await read_bounded(request, self._body_bytes_max, held=hold)
            form = request.headers.get("content-type", "") if request.url.path in FORMS else None
            ask = await self._turns.read_ask(body, request.headers.get("x-gateway-model"), form)
        except BaseException:
            hold.end()
            raise
        weakref.finalize(ask, hold.end)  # its body lives as long as it does: until the answer has ended, however
        query = request.scope["query_string"].decode("latin-1")
        target = request.url.path + (f"?{query}" if query else "")
        errand = Errand(
            ask,
            request.method,
            target,
            dict(request.headers),
            requester,
            arrived_at(request.headers, time.time()),
            deadline if due is None else min(deadline, due),
            due,
        )
        await self._boarding.refuse_known(ask.model, target, ask.body)
        if patience_s == 0:
            self._waiting.see_it_loaded(ask.model, requester)
        work = asyncio.create_task(self._fetch(errand))
        try:
            if ask.stream and request.url.path not in _STREAM_SOUND:
                done, _ = await asyncio.wait({work}, timeout=KEEP_ALIVE_S)
                if not done:
                    return ClosedAfter(
                        self._slow_stream(errand, work),
                        lambda: self._end(errand, work),
                        media_type="text/event-stream",
                        headers={FOUND_MODEL: ask.model},
                    )
            upstream = await work
        except DeadlineTooEarly:
            await self._end(errand, work)
            self._waiting.see_it_loaded(ask.model, requester)
            raise
        except BaseException:
            await self._end(errand, work)
            raise
        return ClosedAfter(
            relayed(errand, upstream),
            lambda: self._end(errand, work),
            status_code=upstream.status_code,
            headers={**response_headers(upstream), FOUND_MODEL: ask.model},
        )

    async def _end(self, errand: Errand, work: asyncio.Task[httpx.Response]) -> None:
        try:
            await abandon(work)
        finally:
            errand.leave()

    async def _fetch(self, errand: Errand) -> httpx.Response:
        """The engine's response once it begins.

        (1) wait until the model serves: earlier deaths of engines are known then; (2) one that died had the request:
        it is a suspect; (3) its turn: at once, unless there are suspects (``serve.ingress.trials``); (4) send;
        (5) answered: done; (6) not routed too often, and no engine died: give up; (7) else again, after a back-off.
        """
        model = errand.ask.model
        # The edge may have sent it to an engine before, unless all requests of the model come here first.
        span = (errand.arrived, time.time() + DEATH_NEWS_S)
        not_routed = 0
        await self._waiting.acquire(
            model, errand.deadline, errand.requester, due=errand.due, ticket=errand.ticket
        )  # (1)
        while True:
            history = await self._waiting.history(model)
            if not errand.seats:
                errand.seats.append(self._boarding.seat(history, errand.target, errand.ask.body))
                came_here_first = AROUND not in errand.headers and history.apart_from(errand.arrived)
                span = (math.inf, math.inf) if came_here_first else span
            seat = errand.seats[0]
            if seat.blame(history, span):  # (2)
                not_routed = 0
            await seat.turn(errand.deadline)  # (3)
            sent_at = time.time()
            try:
                response = await self._relay.send(errand.method, errand.target, errand.headers, errand.ask)  # (4)
                if not is_not_routed(response):
                    return response  # (5)
                await response.aclose()
            except httpx.TransportError as error:  # the edge restarts, or broke off before the first byte
                log.warning("inner-door-broken", extra={"error": type(error).__name__, "model": model})
            seat.came_back()
            span = (sent_at, time.time() + DEATH_NEWS_S)
            not_routed += 1
            if not_routed > _NOT_ROUTED_MAX:  # (6)
                raise NotRouted(
                    f"An engine of '{model}' was ready, but the request could not be brought to it "
                    f"in {not_routed} tries. Try again; if it goes on, see 'gateway status'.",
                    retry_after_s=5.0,
                    state="not_routed",
                )
            await asyncio.sleep(_BACK_OFF_S * 2 ** (not_routed - 1))  # (7)
            await self._waiting.acquire(
                model, errand.deadline, errand.requester, not_routed=True, due=errand.due, ticket=errand.ticket
            )

    async def _slow_stream(self, errand: Errand, work: asyncio.Task[httpx.Response]) -> AsyncIterator[bytes]:
        """Comments while the model loads, then the engine's own stream. The 200 is sent: failures are SSE errors.

        One newline after a comment: a second one would end an event, an empty one, which some clients take for JSON.
        """
        model = errand.ask.model
        while not work.done():
            yield f": {model} is {await self._waiting.outlook(model, errand.ticket)}\n".encode()
            await asyncio.wait({work}, timeout=KEEP_ALIVE_S)
        try:
            upstream = work.result()
        except GatewayError as error:
            yield sse_error(error.body(detail=is_admin(errand.headers)))
            return
        if upstream.status_code != 200:
            yield sse_error(await beginning(upstream))
            return
        async for piece in relayed(errand, upstream):
            yield piece


async def relayed(errand: Errand, upstream: httpx.Response) -> AsyncIterator[bytes]:
    """The response's bytes as they come; its end is reported to the request's seat.

    Raises ``StreamBroken`` if the engine breaks off.
    """
    try:
        async for piece in upstream.aiter_raw():
            yield piece
    except httpx.TransportError as error:
        for seat in errand.seats:
            seat.broke_off()
        raise StreamBroken(f"the engine broke off: {type(error).__name__}") from error
    finally:
        await upstream.aclose()
    for seat in errand.seats:
        seat.answered()


class ClosedAfter(StreamingResponse):
    """A stream that releases its resources however it ends, also when its client left before the first byte."""

    def __init__(self, content: AsyncIterator[bytes], close: Callable[[], Awaitable[None]], **options: Any) -> None:
        super().__init__(content, **options)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, then close."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()


async def abandon(work: asyncio.Task[httpx.Response]) -> None:
    """Cancel ``work``; a response that it already has is closed, so that the edge does not count it without end."""
    if not work.done():
        work.cancel()
        await asyncio.wait({work})
    if not work.cancelled() and work.exception() is None:
        await work.result().aclose()


async def beginning(upstream: httpx.Response) -> bytes:
    """An engine's error message, as far as it arrives within ``_ERROR_S`` and ``_ERROR_BYTES``; then closed."""
    said = b""
    try:
        async with asyncio.timeout(_ERROR_S):
            async for piece in upstream.aiter_raw():
                said += piece
                if len(said) >= _ERROR_BYTES:
                    break
    except (TimeoutError, httpx.TransportError) as error:
        log.warning("engine-error-unfinished", extra={"error": type(error).__name__})
    finally:
        await upstream.aclose()
    return said[:_ERROR_BYTES]


def sse_error(body: Mapping[str, object] | bytes) -> bytes:
    """An SSE ``error`` event. A body that is not in OpenAI's form is wrapped in it."""
    if isinstance(body, bytes):
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict) or not isinstance(parsed.get("error"), dict):
            text = body.decode("utf-8", "replace")[:500]
            parsed = {"error": {"message": text, "type": "server_error", "code": "engine_error", "param": None}}
        body = parsed
    return b"event: error\ndata: " + json.dumps(body).encode() + b"\n\n"


def is_admin(headers: Mapping[str, str]) -> bool:
    """Whether the edge marks the request's key as an administrator's."""
    return headers.get("x-gateway-role") == "admin"


def requester_of(headers: Mapping[str, str]) -> Requester:
    """The requester that the edge names."""
    priority = Priority.BATCH if headers.get(PRIORITY) == Priority.BATCH else Priority.INTERACTIVE
    return Requester(headers.get(TAG, ""), headers.get(CALLER, ""), priority)


def arrived_at(headers: Mapping[str, str], now: float) -> float:
    """Arrival at the edge (``x-gateway-arrived``, ms since the epoch); ``now`` without the header."""
    stamp = headers.get("x-gateway-arrived", "")
    return int(stamp) / 1000 if stamp.isdigit() else now


def deadline_s(headers: Mapping[str, str]) -> float | None:
    """How long the client waits in all (``x-gateway-deadline-s``); ``None`` without the header.

    Raises ``InvalidRequest`` for anything but one positive number, as the edge does.
    """
    said = headers.get("x-gateway-deadline-s")
    if said is None:
        return None
    if not _DEADLINE.fullmatch(said) or float(said) <= 0:
        raise InvalidRequest("The header x-gateway-deadline-s is one positive number of seconds.")
    return float(said)


def ready_to_wait_s(headers: Mapping[str, str]) -> float | None:
    """The client's limit of waiting for its model (``x-gateway-wait``); ``None`` without the header."""
    said = headers.get("x-gateway-wait", "")
    return float(said) if said.isascii() and said.isdigit() else None
