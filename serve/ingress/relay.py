"""Back through the edge: a request whose model is ready is sent to the inner door, so that the edge counts it."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import aiohttp
import httpx
from yarl import URL

from gateway_plugin.passing import NOT_ROUTED, PRIORITY
from serve.ingress.body import Ask
from serve.ingress.budget import TAG

_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
     "upgrade", "host", "content-length", "expect"}
)  # fmt: skip
"""RFC 9110, 7.6.1, and headers that the HTTP client sets itself."""

STAMP = "x-gateway-stamp"
"""Put on by the inner door."""

CALLER = "x-gateway-caller"
"""The edge's tag of the caller behind an endpoint's key."""
_PASSED_ON = ("x-gateway-request", TAG, CALLER, PRIORITY)
"""By these the edge orders what waits for an engine that has as many requests as it takes."""


_HEAD_BYTES = 1 << 16
"""Longest line of an engine's response head; HAProxy's buffer holds no more."""
_WRITTEN_AT_ONCE = 1 << 16
"""A larger body is sent in pieces, so that the loop does not block."""


class Relay:
    """The inner door's client: one connection a request, no pool.

    A pool has no advantage on a Unix socket, and httpcore's scans all its connections for every request:
    1.4 ms of CPU a request with 50 of them open, 46 ms with 2,000. aiohttp comes with ``ray[serve]``, parses in C, and
    takes the same time with any number open. Its responses are converted to httpx's types.
    """

    def __init__(self, inner_door: Path) -> None:
        self._inner_door = inner_door
        self._session: aiohttp.ClientSession | None = None

    def _client(self) -> aiohttp.ClientSession:
        """Created by the first request: it belongs to the running loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(path=str(self._inner_door), limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,  # the bytes are passed on unchanged
                skip_auto_headers=("accept", "accept-encoding", "content-type", "user-agent"),
                max_line_size=_HEAD_BYTES,
                max_field_size=_HEAD_BYTES,
            )
        return self._session

    async def send(self, method: str, path: str, headers: Mapping[str, str], ask: Ask) -> httpx.Response:
        """The engine's response, its body not read yet; the caller closes it.

        Raises ``httpx.TransportError`` if the edge is away or breaks off.
        """
        kept = {
            name: value
            for name, value in headers.items()
            if name.lower() not in _HOP_BY_HOP and not name.lower().startswith("x-gateway-")
        }
        kept.update({name: headers[name] for name in _PASSED_ON if name in headers})
        kept["x-gateway-model"] = ask.model
        body = ask.body if len(ask.body) <= _WRITTEN_AT_ONCE else io.BytesIO(ask.body)
        target = URL(f"http://inner{path}", encoded=True)
        try:
            reply = await self._client().request(method, target, headers=kept, data=body, allow_redirects=False)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _transport_error(error) from error
        return httpx.Response(reply.status, headers=list(reply.raw_headers), stream=_Bytes(reply))

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()


class _Bytes(httpx.AsyncByteStream):
    """A response's body as it comes."""

    def __init__(self, reply: aiohttp.ClientResponse) -> None:
        self._reply = reply

    async def __aiter__(self) -> AsyncIterator[bytes]:
        content = self._reply.content
        try:
            async for piece in content.iter_any():
                yield piece
        except (aiohttp.ClientError, TimeoutError) as error:
            content.set_exception(None)  # type: ignore[arg-type] # else what came before the break cannot be read
            if rest := content.read_nowait():
                yield rest
            raise _transport_error(error) from error

    async def aclose(self) -> None:
        """Close the connection: an unfinished answer is dropped, and the edge cancels it at the engine."""
        self._reply.close()


def _transport_error(error: Exception) -> httpx.TransportError:
    kind = httpx.ConnectError if isinstance(error, aiohttp.ClientConnectorError) else httpx.RemoteProtocolError
    return kind(f"{type(error).__name__}: {error}")


def response_headers(response: httpx.Response) -> dict[str, str]:
    """The engine's headers that are passed on. With its length: HTTP/1.0 has no chunks."""
    dropped = _HOP_BY_HOP - {"content-length"}
    return {name: value for name, value in response.headers.items() if name.lower() not in dropped}


def is_not_routed(response: httpx.Response) -> bool:
    """The edge had no usable engine for it: the request came back to an ingress."""
    return NOT_ROUTED in response.headers
