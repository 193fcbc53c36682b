"""``httpx`` over Globus Compute: each request of ``openai`` or of the client becomes a part of a task."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import httpx

from gateway_plugin.api_types import whole
from gateway_plugin.channel import Channel, Item, result_of
from gateway_plugin.errors import Forbidden, GatewayError, InvalidRequest, ModelNotFound
from gateway_plugin.globus.client.transport import Transport

_MODEL = "/v1/models/"
_FILES = ("/v1/audio/", "/v1/images/edits")


class TaskTransport(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Errors are answers here, as the gateway's are: with status, code and ``Retry-After``. The request's read timeout
    is its deadline; the header ``x-gateway-wait: 0`` has it not wait for its model. No streaming.
    """

    def __init__(self, channel: Channel, tasks: Transport) -> None:
        self._channel, self._tasks = channel, tasks

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send it and wait. Interrupted (Ctrl-C), it is cancelled if it was not sent yet."""
        request.read()
        try:
            return _answer(request, result_of(self._begin(request), self._channel))
        except GatewayError as error:
            return _refusal(error)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The same for ``asyncio``; cancelled, it is not sent if it was not yet."""
        await request.aread()
        try:
            future = self._begin(request)
            return _answer(request, await asyncio.wrap_future(future))
        except GatewayError as error:
            return _refusal(error)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            return _refusal(self._channel.closed())

    def _begin(self, request: httpx.Request) -> Future[Any]:
        path = request.url.path
        if path == "/gateway/v1/status":
            known: Future[Any] = Future()
            known.set_result(self._tasks.endpoint())
            return known
        if path.startswith("/gateway/"):
            raise Forbidden(f"{path}: through Globus Compute there is inference; administer the gateway at its site.")
        refuse_files(path)
        body = _body(request)
        seconds = request.extensions.get("timeout", {}).get("read")
        timeout_s = min(self._channel.longest_s if seconds is None else seconds, self._channel.longest_s)
        wait = request.headers.get("x-gateway-wait") != "0"
        if body is None and path.startswith(_MODEL):
            path = _MODEL.rstrip("/")  # the site's function has the list alone
        return self._channel.submit(Item(path, body, whole, wait, timeout_s))


def refuse_files(path: str) -> None:
    """Raises ``InvalidRequest`` for a path that takes a file or answers with one."""
    if path.startswith(_FILES):
        raise InvalidRequest(
            f"{path} takes or answers with a file, and requests and answers travel through Globus Compute as JSON. Use "
            "the HTTP API through a tunnel: 'ssh -N -L 8180:127.0.0.1:8180 GATEWAY-HOST' to the gateway's own machine, "
            "then gateway_plugin.Client('https://127.0.0.1:8180', KEY, ca=FILE).openai."
        )


def _body(request: httpx.Request) -> Mapping[str, Any] | None:
    if request.method == "GET":
        return None
    try:
        body = json.loads(request.content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise InvalidRequest("Through Globus Compute a request is a JSON object; files cannot be sent.")
    return body


def _answer(request: httpx.Request, document: Mapping[str, Any]) -> httpx.Response:
    path = request.url.path
    if path == "/gateway/v1/status":
        document = {"state": str(document.get("status", "unknown")), "details": document.get("details")}
    elif request.method == "GET" and path.startswith(_MODEL):
        document = _model(document, path.removeprefix(_MODEL))
    return httpx.Response(200, json=document)


def _model(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """One model of the list, by name or alias. Raises ``ModelNotFound``."""
    entries = document["data"]
    for entry in entries:
        if name == entry["id"] or name in (entry.get("aliases") or ()):
            found: Mapping[str, Any] = entry
            return found
    raise ModelNotFound(name, tuple(entry["id"] for entry in entries))


def _refusal(error: GatewayError) -> httpx.Response:
    return httpx.Response(error.status, json=error.body(), headers=error.headers())
