"""A small, fast HTTP/1.1 server for test programs: one asyncio protocol over httptools, no framework.

Made for stand-ins that must start in a fraction of a second and serve faster than what is tested in front of them.
A handler gets an ``Exchange`` and either answers at once (``exchange.send``) or returns a coroutine, which is cancelled
when the client leaves.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httptools
import uvloop


@dataclass
class Request:
    """One request, whole. Header names are lower case; ``target`` is as it came."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    def header(self, name: str) -> str:
        """The last header called ``name`` (lower case), ``""`` if there is none."""
        return next((value for key, value in reversed(self.headers) if key == name), "")

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


@dataclass
class Exchange:
    """One request and its answer."""

    request: Request
    connection: Connection
    _streaming: bool = field(default=False, init=False)

    def send(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """The whole answer at once."""
        head = _head(status, content_type, headers) + f"content-length: {len(body)}\r\n\r\n"
        self.connection.write(head.encode("latin-1") + body)

    def start(self, status: int = 200, content_type: str = "text/event-stream") -> None:
        """Begin a chunked answer."""
        self._streaming = True
        self.connection.write(
            (_head(status, content_type, ()) + "transfer-encoding: chunked\r\n\r\n").encode("latin-1")
        )

    async def chunk(self, data: bytes) -> None:
        """One chunk, on the wire at once; waits while the client is slow."""
        self.connection.write(b"%x\r\n%b\r\n" % (len(data), data))
        await self.connection.writable.wait()

    def end(self) -> None:
        """The terminating chunk."""
        self.connection.write(b"0\r\n\r\n")


def _head(status: int, content_type: str, headers: tuple[tuple[str, str], ...]) -> str:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    phrase = next((known.phrase for known in HTTPStatus if known == status), "X")
    return f"HTTP/1.1 {status} {phrase}\r\ncontent-type: {content_type}\r\n{lines}"


Handler = Callable[[Exchange], Coroutine[Any, Any, None] | None]


class Connection(asyncio.Protocol):
    """One client connection: requests are answered one after the other, in order."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[Exchange] = deque()
        self._task: asyncio.Task[None] | None = None
        self.writable = asyncio.Event()
        self.writable.set()

    # --- transport ---
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.writable.set()
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            if self._transport is not None:
                self._transport.close()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def abort(self) -> None:
        """Break off."""
        if self._transport is not None:
            self._transport.abort()

    # --- parser ---
    def on_message_begin(self) -> None:
        self._target, self._headers, self._body = b"", [], b""  # type: bytes, list[tuple[str, str]], bytes

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))
        if name.lower() == b"expect":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        method = self._parser.get_method().decode()
        request = Request(method, self._target.decode("latin-1"), self._headers, self._body)
        self._waiting.append(Exchange(request, self))
        if self._task is None:
            self._next()

    def _next(self) -> None:
        while self._waiting and self._transport is not None:
            work = self._handler(self._waiting.popleft())
            if work is not None:
                self._task = asyncio.get_running_loop().create_task(work)
                self._task.add_done_callback(self._done)
                return

    def _done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and task.exception() is not None:
            asyncio.get_running_loop().call_exception_handler({"message": "handler", "exception": task.exception()})
            if self._transport is not None:
                self._transport.abort()
        self._next()


def tls_context(keyfile: str, certfile: str, ca_certs: str | None, cert_reqs: int) -> ssl.SSLContext:
    """A server's context as vLLM's ``--ssl-*`` options mean it; ``cert_reqs`` 2 demands a client certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certfile, keyfile)
    context.verify_mode = ssl.VerifyMode(cert_reqs)
    if ca_certs:
        context.load_verify_locations(ca_certs)
    return context


async def listen(
    handler: Handler, host: str, port: int, uds: str | None = None, tls: ssl.SSLContext | None = None
) -> asyncio.AbstractServer:
    """Serve ``handler`` on ``host:port``, or on the Unix socket ``uds``."""
    loop = asyncio.get_running_loop()
    if uds:
        return await loop.create_unix_server(lambda: Connection(handler), uds, ssl=tls)
    return await loop.create_server(lambda: Connection(handler), host, port, ssl=tls, backlog=2048)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a program on uvloop."""
    uvloop.run(main)
