"""The client's way through Globus Compute: requests become batches of tasks at a site's endpoint."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from gateway_plugin.channel import File, Item, Map
from gateway_plugin.errors import ConfigError, EndpointUnavailable, GatewayError, InvalidRequest, PromptTooLarge
from gateway_plugin.globus import function_registry as registry
from gateway_plugin.globus.client.batcher import Batcher
from gateway_plugin.globus.client.batches import Batch, BatchKey, Call, Limits, Pace, size
from gateway_plugin.globus.client.futures import close_at_exit
from gateway_plugin.globus.client.httpx_transport import TaskTransport, refuse_files
from gateway_plugin.globus.client.protocol import GROUP_PROMPTS
from gateway_plugin.globus.client.results import resumed
from gateway_plugin.globus.client.sdk_transport import SdkTransport
from gateway_plugin.globus.client.transport import Transport
from gateway_plugin.ownership import problem_with
from gateway_plugin.paths import default_state_root

if TYPE_CHECKING:
    from globus_compute_sdk import Client as SdkClient

SUBMISSION_BYTES = 9_500_000
"""Of one request as it travels; Globus Compute takes 10 MB, its own envelope included."""
_MOMENT_S = 2.0
NO_STREAMING = (
    "There is no streaming through Globus Compute: a task has one result. Two ways: (1) the HTTP API through a tunnel "
    "('ssh -N -L 8180:127.0.0.1:8180 GATEWAY-HOST' to the gateway's own machine, then "
    "gateway_plugin.Client('https://127.0.0.1:8180', KEY, ca=FILE).openai); "
    "(2) leave 'stream' out and ask for short answers (max_tokens)."
)


class GlobusChannel:
    """One site's endpoint. Requests of any thread wait 50 ms for company and travel together; each has a future and an
    error of its own. A failed task is sent again under the same key, for which the site computes once.

    Args:
        endpoint_id: of the site's endpoint; else ``$GATEWAY_ENDPOINT``.
        function_id: of the site's function; else ``$GATEWAY_FUNCTION``, else what was registered from this machine.
        task_group_id: of everything but maps, a UUID to ``resume`` by; otherwise a new one.
        client: Globus Compute's own ``Client``, for another way to log in.
        options: for the endpoint's template, where the site allows any.
        limits: of a batch.
        transport: for tests.

    Raises ``ConfigError`` where the SDK is missing or an id is malformed.
    """

    base_url = "http://globus-compute.invalid"
    key = "not-needed"
    at_hand = False
    streams, retries = False, 0
    poll_s, look_s, answer_s = 3.0, 2.0, 180.0
    # answer_s: the first task of a user starts a process at the endpoint, slowly where the file system is slow.
    longest_s = 6 * 3600.0
    texts = 32

    def __init__(
        self,
        endpoint_id: str | None = None,
        function_id: str | None = None,
        *,
        task_group_id: str | None = None,
        client: SdkClient | None = None,
        options: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        pace: Pace | None = None,
        transport: Transport | None = None,
    ) -> None:
        self.group = _group(task_group_id)
        """Task group of everything but maps."""
        self.url = endpoint_id or "?"
        if transport is None:
            self.url, function = find_endpoint(endpoint_id, function_id)
            transport = SdkTransport(self.url, function, client, options)
        self.tasks = transport
        self._maps: set[str] = set()
        """Task groups of the maps under way."""
        self._keys: dict[tuple[str, bool, float], BatchKey] = {}
        self._last_ms = 0
        self._lock = threading.Lock()
        self.batcher = Batcher(transport, self._ended, limits, pace)
        """Of the loop's thread alone."""
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._broken)
        self._timer: asyncio.Handle | None = None
        self._closed = False
        self._process = os.getpid()
        threading.Thread(target=self._run, name="globus-client", daemon=True).start()
        close_at_exit(self)

    def options(self, *, asynchronous: bool) -> dict[str, Any]:
        return {"transport": TaskTransport(self, self.tasks)}

    def submit(self, item: Item) -> Future[Any]:
        """Raises ``GatewayError`` where it cannot be sent."""
        call = _call(_content(item), item)
        label = item.path if item.body is None else str(item.body.get("model", item.path))
        kind = (label, item.wait, item.timeout_s)
        self._check_process()
        with self._lock:
            self._check_open()
            if kind not in self._keys:
                self._keys[kind] = BatchKey(self.group, self._name(), *kind)
            self._loop.call_soon_threadsafe(self._take, self._keys[kind], [call])
        return call.future

    def map(
        self, items: Sequence[Item], label: str, concurrency: int, group: str | None, file: File | None = None
    ) -> Map:
        """``concurrency`` is not used: batches are as large as they may be. ``group``: a UUID, otherwise a new one."""
        if len(items) > GROUP_PROMPTS:
            raise InvalidRequest(f"A map takes at most {GROUP_PROMPTS:,} prompts, got {len(items):,}: make several.")
        if file is None:
            calls = [_call(_content(item), item) for item in items]
        else:
            calls = [_call({"line": number}, item) for number, item in enumerate(items, file.first)]
        self._check_process()
        with self._lock:
            self._check_open()
            found = _group(group)
            if found == self.group or found in self._maps:
                raise InvalidRequest(f"task_group_id: {found} is in use by this client; take another for this map.")
            self._maps.add(found)
            if items:
                key = BatchKey(found, self._name(), label, items[0].wait, items[0].timeout_s, file, len(calls))
                self._loop.call_soon_threadsafe(self._take, key, calls)
        return found, [call.future for call in calls]

    def release(self, group: str) -> None:
        """Send nothing more of a map's ``group``, and expect nothing more of it."""
        self._on_loop(lambda: self.batcher.forget(group))
        with self._lock:
            self._maps.discard(group)

    def resume(self, group: str, timeout_s: float, progress: bool | None) -> list[Any]:
        return resumed(self.tasks, group, timeout_s, progress)

    def how_to_go_on(self, group: str) -> str:
        return f"Those at the site go on there; fetch all answers within half an hour with resume('{group}')."

    def unreachable(self, error: Exception) -> GatewayError:
        return EndpointUnavailable(f"The endpoint {self.url} cannot be asked ({type(error).__name__}: {error}).")

    def closed(self) -> GatewayError:
        return EndpointUnavailable("This client is closed; the request was not sent.")

    def close(self) -> None:
        def end() -> None:
            self.batcher.end()
            self._loop.stop()

        self._on_loop(end, closing=True)

    def _on_loop(self, work: Callable[[], None], closing: bool = False) -> None:
        """Have the loop's thread do it (in a moment), after all that was submitted; nothing once it is closed."""
        if self._process != os.getpid():
            return  # the loop, and all that was sent, is the parent's
        done = threading.Event()

        def do() -> None:
            work()
            done.set()

        with self._lock:
            if self._closed:
                return
            self._closed = closing
            self._loop.call_soon_threadsafe(do)
        done.wait(_MOMENT_S)

    # --- on the loop's thread ---
    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def _take(self, key: BatchKey, calls: list[Call]) -> None:
        self.batcher.offer(key, calls)
        self._soon()

    def _ended(self, batch: Batch, future: Future[Any]) -> None:
        def finish() -> None:
            self.batcher.finish(batch, future, self._loop.time())
            self._soon()

        with suppress(RuntimeError):  # the loop has ended, and with it all that waited for this
            self._loop.call_soon_threadsafe(finish)

    def _soon(self) -> None:
        """A turn after all that came at the same time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        wake = self.batcher.turn(self._loop.time())
        self._timer = None if wake is None else self._loop.call_at(wake, self._turn)

    def _broken(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An error of this package: no caller may wait without end."""
        loop.default_exception_handler(context)
        self._closed = True
        self.batcher.end()
        loop.stop()

    def _name(self) -> str:
        """By the time it begins: ``resume`` gives the sequences of a group in that order, also of several processes."""
        self._last_ms = max(int(time.time() * 1000), self._last_ms + 1)
        return f"{self._last_ms:011x}{uuid.uuid4().hex[:5]}"

    def _check_process(self) -> None:
        """Before the lock is taken: in a forked child it may be held for ever."""
        if self._process != os.getpid():
            raise EndpointUnavailable(
                "This client was made in another process and has no connection to Globus Compute in this one: make a "
                "client in each process."
            )

    def _check_open(self) -> None:
        if self._closed:
            raise self.closed()


def find_endpoint(endpoint_id: str | None = None, function_id: str | None = None) -> tuple[str, str]:
    """Endpoint and function: of the arguments, else of the environment; the function else as it was registered from
    this machine. Raises ``ConfigError`` naming the one that is not known.
    """
    found = {"endpoint": endpoint_id or os.environ.get("GATEWAY_ENDPOINT")}
    found["function"] = function_id or os.environ.get("GATEWAY_FUNCTION")
    if found["endpoint"] and not found["function"]:
        found["function"] = _registered_here()
    for what, value in found.items():
        if not value:
            shown = f"give its id ('gateway endpoint status' shows it), or set GATEWAY_{what.upper()}"
            raise ConfigError(f"No {what} is known: {shown}.")
    return str(found["endpoint"]), str(found["function"])


def _registered_here() -> str | None:
    """The id of this version's function, on a machine whose state folder has a manifest of it."""
    state = default_state_root()
    if problem_with(state) is not None:
        return None  # it may be another user's, who would choose the function
    found = registry.registered(registry.read(state / "endpoints" / "functions.json"), registry.source())
    return found.id if found else None


def _group(given: str | None) -> str:
    try:
        return str(uuid.uuid4() if given is None else uuid.UUID(given))
    except (ValueError, AttributeError, TypeError):
        words = "expected a UUID, as uuid.uuid4() gives and not used for anything else"
        raise InvalidRequest(f"task_group_id: {words}, got {given!r}") from None


def _content(item: Item) -> dict[str, Any]:
    """``{"path", "body"?}``. Raises ``InvalidRequest`` for files, ``stream`` and headers."""
    refuse_files(item.path)
    if item.headers:
        names = ", ".join(sorted(item.headers))
        raise InvalidRequest(
            f"extra_headers: through Globus Compute only 'x-gateway-wait: 0' can be sent, got {names}."
        )
    if item.body is None:
        return {"path": item.path}
    if item.body.get("stream"):
        raise InvalidRequest(NO_STREAMING)
    return {"path": item.path, "body": {name: value for name, value in item.body.items() if name != "stream"}}


def _call(content: Mapping[str, Any], item: Item) -> Call:
    now = time.monotonic()
    try:
        found = size(content, now)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"Prompts and options travel as JSON, which these are not: {error}.") from None
    if found.request_bytes > SUBMISSION_BYTES:
        raise PromptTooLarge(
            f"The prompt takes {found.request_bytes:,} bytes, Globus Compute {SUBMISSION_BYTES:,} a submission. Put it "
            "into a file at the site and use map_file()."
        )
    return Call(content, found, now + item.timeout_s, item.read)
