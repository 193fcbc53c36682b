"""The client's way over HTTP: TLS or the gateway's own socket, and many requests at a time on one thread."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import ssl
import threading
import uuid
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from gateway_plugin.api_types import parse_error, understood
from gateway_plugin.channel import WAIT_HEADER, File, Item, Map
from gateway_plugin.connection import find_gateway, on_loopback
from gateway_plugin.errors import GatewayError, GatewayUnreachable, InvalidRequest, WaitDeadline
from gateway_plugin.model_header import naming_async_client
from gateway_plugin.retrying import pause_s

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAIError

_LIMITS = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
"""Those of ``openai``'s own client."""
_AT_ONCE = 64
"""Submitted requests for one model in flight; the rest wait here, where they cost the gateway nothing. Those that wait
for a model that is cold are in the way of no other model's, nor of those that do not wait."""
_FILES = ("/v1/audio/", "/v1/images/edits")
_ONLY_GLOBUS = (
    "map_file(), resume() and task_group_id are there with Client(endpoint=ID) only: over HTTP no service keeps tasks "
    "and answers."
)


class HttpChannel:
    """One gateway over HTTP. Arguments and errors: as of ``Client``."""

    streams, retries = True, 2
    poll_s, look_s, answer_s = 0.5, 0.0, 60.0
    longest_s = math.inf
    texts = 256

    def __init__(
        self,
        base_url: str | None,
        api_key: str | None,
        state: str | Path | None,
        ca: str | Path | None,
        plain_http: bool | None,
        transport: httpx.BaseTransport | None,
    ) -> None:
        self._transport = transport
        plain_http = True if transport is not None else plain_http
        self._gateway = find_gateway(base_url, api_key, state, ca=ca, plain_http=plain_http)
        self.url, self.key = self._gateway.url, self._gateway.key
        self.at_hand = self._gateway.door is not None
        self.base_url = "http://localhost" if self.at_hand else self.url
        self._verify = self._gateway.verify()
        self._closed = False
        self._begin_process()
        _channels.add(self)

    def _begin_process(self) -> None:
        """What is of one process: its thread, which sends when there is a request, and what it has in flight."""
        self._lock = threading.Lock()
        self._sending: tuple[asyncio.AbstractEventLoop, AsyncOpenAI] | None = None
        self._stop: weakref.finalize[..., HttpChannel] | None = None
        self._gates: weakref.WeakValueDictionary[tuple[str, bool], asyncio.Semaphore] = weakref.WeakValueDictionary()
        """By model (or path) and whether a request waits; each as long as it has requests."""
        self._maps: dict[str, list[Future[Any]]] = {}

    def begin_after_fork(self) -> None:
        """In a forked child, where the thread is not: leave to the parent what is its own, its connections above all,
        and begin anew.
        """
        if self._stop is not None:
            self._stop.detach()
        _of_parent.append((self._sending, self._maps, self._gates))
        self._begin_process()

    def options(self, *, asynchronous: bool) -> dict[str, Any]:
        door, kind = self._gateway.door, httpx.AsyncHTTPTransport if asynchronous else httpx.HTTPTransport
        own = None if door is None else kind(uds=str(door), limits=_LIMITS)
        # A cluster's proxy settings are for the world outside: a gateway on this machine is not reached through one.
        trust_env = not on_loopback(self.url)
        return {
            "transport": self._transport or own,
            "verify": self._verify,
            "limits": _LIMITS,
            "trust_env": trust_env,
        }

    def submit(self, item: Item) -> Future[Any]:
        _check(item)
        return self._begin(item)

    def map(
        self, items: Sequence[Item], label: str, concurrency: int, group: str | None, file: File | None = None
    ) -> Map:
        if group is not None or file is not None:
            raise InvalidRequest(_ONLY_GLOBUS)
        for item in items:  # before the first is sent
            _check(item)
        gate, name = asyncio.Semaphore(concurrency), uuid.uuid4().hex
        self._maps[name] = [self._begin(item, gate) for item in items]
        return name, self._maps[name]

    def release(self, group: str) -> None:
        for future in self._maps.pop(group, ()):
            future.cancel()

    def resume(self, group: str, timeout_s: float, progress: bool | None) -> list[Any]:
        raise InvalidRequest(_ONLY_GLOBUS)

    def how_to_go_on(self, group: str) -> str:
        return "The others are cancelled."

    def unreachable(self, error: Exception) -> GatewayError:
        return unreachable(self.url, error, self.at_hand)

    def closed(self) -> GatewayError:
        return GatewayUnreachable("This client is closed.")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._stop is not None:
                self._stop()

    def _begin(self, item: Item, gate: asyncio.Semaphore | None = None) -> Future[Any]:
        """``gate``: of a map, whose prompts have their time from when they are sent."""
        with self._lock:
            if self._closed:
                raise self.closed()
            if self._sending is None:
                # openai's 2 is made of httpx and its 3 of httpx2, of which it takes either client.
                http: Any = httpx.AsyncClient(**self.options(asynchronous=True))
                openai = naming_async_client(base_url=self.base_url, api_key=self.key, http_client=http, max_retries=0)
                self._sending = asyncio.new_event_loop(), openai
                threading.Thread(target=_run, args=self._sending[:1], name="gateway-client", daemon=True).start()
                # for a client that is not closed, too: when it is collected, or the program ends
                self._stop = weakref.finalize(self, _stop, *self._sending)
            loop, openai = self._sending
            single = gate is None
            if gate is None:
                label = str((item.body or {}).get("model", item.path))
                gate = self._gates.setdefault((label, item.wait), asyncio.Semaphore(_AT_ONCE))
            return asyncio.run_coroutine_threadsafe(self._ask(openai, item, gate, single), loop)

    async def _ask(self, openai: AsyncOpenAI, item: Item, gate: asyncio.Semaphore, single: bool) -> Any:
        """One answer, read; the time of a ``single`` one counts from now. Raises ``GatewayError``."""
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(item.timeout_s if single else None) as limit, gate:
                if not single:
                    limit.reschedule(clock() + item.timeout_s)
                answer = await self._answer(openai, item, lambda: (limit.when() or clock()) - clock())
        except TimeoutError:
            raise WaitDeadline(f"No answer to {item.path} within {item.timeout_s:g} s.") from None
        except asyncio.CancelledError:
            if self._closed:
                raise self.closed() from None
            raise
        if not isinstance(answer, dict):
            raise not_a_gateway(self.url, item.path)
        found = understood(item.read, answer)
        if isinstance(found, GatewayError):
            raise found
        return found

    async def _answer(self, openai: AsyncOpenAI, item: Item, left_s: Callable[[], float]) -> object:
        """Send it, again where that makes sense (``retrying``), and not where it does not wait."""
        from openai import OpenAIError

        headers = {**(item.headers or {}), **({} if item.wait else {WAIT_HEADER: "0"})}
        options: Any = {"timeout": item.timeout_s, "headers": headers}
        repeats = 0
        while True:
            try:
                if item.body is None:
                    return await openai.get(item.path, cast_to=object, options=options)
                return await openai.post(item.path, cast_to=object, body=item.body, options=options)
            except OpenAIError as error:
                failed = gateway_error(error, self.url, self.at_hand)
            pause = pause_s(failed, repeats, left_s(), random.random()) if item.wait else None  # noqa: S311
            if pause is None:
                raise failed
            await asyncio.sleep(pause)
            repeats += 1


_channels: weakref.WeakSet[HttpChannel] = weakref.WeakSet()
_of_parent: list[object] = []
"""Never collected: the end of a loop or a future would wake the parent's thread."""


def _begin_after_fork() -> None:
    for channel in _channels:
        channel.begin_after_fork()


# When a process has forked, not with the next request: the child has one thread now, and a lock may be held for ever.
os.register_at_fork(after_in_child=_begin_after_fork)


def _check(item: Item) -> None:
    """Raises ``InvalidRequest`` for a body that cannot be sent, or not be answered whole."""
    if item.path.startswith(_FILES):
        raise InvalidRequest(f"{item.path}: files are sent and fetched by Client().openai (.audio, .images).")
    if item.body is None:
        return
    if item.body.get("stream"):
        raise InvalidRequest("Answers come whole here: leave 'stream' out, or use Client().openai.")
    try:
        json.dumps(item.body, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"Prompts and options travel as JSON, which these are not: {error}.") from None


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop, openai: AsyncOpenAI) -> None:
    asyncio.run_coroutine_threadsafe(_end(openai), loop)


async def _end(openai: AsyncOpenAI) -> None:
    """Cancel every request of the running loop, and end it."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await openai.close()
    asyncio.get_running_loop().stop()


def not_a_gateway(url: str, path: str) -> GatewayUnreachable:
    """What listens at ``url`` answers, and not with JSON."""
    return GatewayUnreachable(f"What answers at {url} is not a gateway: {path} is no JSON there.")


def unreachable(url: str, error: BaseException, at_hand: bool) -> GatewayUnreachable:
    """The error of a connection that failed; ``at_hand``: the user can start the gateway here."""
    if (unproven := _unproven(error)) is not None:
        return GatewayUnreachable(
            f"What listens at {url} has not proved to be the gateway, and was sent nothing: {unproven}. Set GATEWAY_CA "
            "(or ca=) to a file with what 'gateway ca' prints there, and use a name or address that is in its "
            "certificate."
        )
    if at_hand:
        advice = "See 'gateway status'; 'gateway up' starts it."
    elif on_loopback(url):
        advice = (
            "That is this machine's own loopback: is the tunnel to the gateway's machine open, and at this port? "
            "Whether the gateway is up, those who run it see by 'gateway status' there."
        )
    else:
        advice = (
            "Is that its address (GATEWAY_URL), and can this machine reach it? A gateway on its machine's loopback "
            "takes a tunnel. Whether it is up, those who run it see by 'gateway status' there."
        )
    return GatewayUnreachable(
        f"The gateway at {url} does not answer ({type(error).__name__}: {error}). {advice}", retry_after_s=5.0
    )


def _unproven(error: BaseException | None) -> str | None:
    """What is wrong with the server's certificate, if that is why there was no connection."""
    for _ in range(8):  # httpx and its transport each put an error of their own around it
        if error is None:
            return None
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message or str(error)
        error = error.__cause__ or error.__context__
    return None


def gateway_error(error: OpenAIError, url: str, at_hand: bool = False) -> GatewayError:
    """The gateway's own error for one that ``openai`` raised (it survives pickling; ``openai``'s does not always).

    ``at_hand``: as ``Client.at_hand``.
    """
    from openai import APIConnectionError, APIError, APIStatusError

    if isinstance(error, APIStatusError):
        try:
            body = error.response.json()
        except ValueError:
            body = None
        return parse_error(error.status_code, body, dict(error.response.headers))
    if isinstance(error, APIConnectionError):
        cause = error.__cause__ or error
        if isinstance(cause, httpx.ReadTimeout):
            return WaitDeadline(f"The gateway at {url} did not answer within the request's timeout.")
        return unreachable(url, cause, at_hand)
    if isinstance(error, APIError):  # an error event in the middle of a stream
        return parse_error(503, {"error": error.body}, {})
    return GatewayError(f"The answer of the gateway at {url} could not be understood: {error}")
