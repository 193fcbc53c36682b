"""The sockets of ingress and desk: the edge sends requests straight to them. There is no HTTP proxy of Serve's.

That proxy is one process for the whole head and copies every piece of an answer through two event loops; a thousand
streams through it starve status and administration, a dying replica is answered in plain text, and it listens on a port
that every user of the machine can reach. So ingress and desk listen by themselves, on Unix sockets in the run folder,
and Serve only keeps their processes alive.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.ingress.inference import StreamBroken

_BACKLOG = 4096
_IDLE_S = 3600
"""The edge keeps its connections, and closes those that it does not need."""
_RESERVED = 512
"""Descriptors not for requests: Ray's, logs, the edge's idle connections."""
_A_REQUEST = 2
"""Descriptors of a forwarded request: to the edge, and back through its inner door."""


def requests_max(wanted: int) -> int:
    """How many requests this process's descriptors allow, ``wanted`` at most. Raises its soft limit to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return wanted if hard == resource.RLIM_INFINITY else max(1, min(wanted, (hard - _RESERVED) // _A_REQUEST))


class EndsWithClient:
    """ASGI middleware: a request whose client disconnected is cancelled, wherever it waits after its body was read.

    uvicorn only reports that on ``receive``. An answer that breaks off is logged here; its transfer breaks off too.
    """

    def __init__(self, app: ASGIApp, log: logging.Logger) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        whole, answered = asyncio.Event(), asyncio.Event()
        left: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        async def receive_once() -> Message:
            if whole.is_set():
                return await asyncio.shield(left)
            message = await receive()
            if message["type"] == "http.disconnect":
                left.set_result(message)
                whole.set()
            elif not message.get("more_body"):
                whole.set()
            return message

        async def send_on(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                answered.set()  # from here on uvicorn reports "disconnect", connected or not

        async def watch() -> None:
            await whole.wait()
            if not left.done():
                left.set_result(await receive())

        work = asyncio.ensure_future(self._app(scope, receive_once, send_on))
        watching = asyncio.create_task(watch())
        try:
            await asyncio.wait({work, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not answered.is_set():
                work.cancel()
            await asyncio.wait({work})
            if not work.cancelled():
                work.result()
        except StreamBroken as error:
            self._log.warning("stream-broken", extra={"path": scope["path"], "error": str(error)})
            raise
        except Exception:
            self._log.exception("request-failed", extra={"path": scope["path"]})
            raise
        finally:
            work.cancel()
            watching.cancel()


class Listener:
    """Serves an application on a Unix socket of this user's, 0600."""

    def __init__(self, app: ASGIApp, path: Path, log: logging.Logger) -> None:
        self._path = path
        self._log = log
        self._server = uvicorn.Server(
            uvicorn.Config(
                EndsWithClient(app, log),
                lifespan="off",
                log_config=None,
                log_level=logging.CRITICAL,  # a transfer that breaks off is in our own log, in one line
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=_IDLE_S,
                backlog=_BACKLOG,
                ws="none",
            )
        )

    async def serve(self) -> None:
        """Until cancelled. The socket's name is taken from an earlier process in one step, once this one listens."""
        own = self._path.with_name(f"{self._path.stem}-{os.getpid()}.sock")
        own.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(str(own))
            own.chmod(0o600)
            listening.listen(_BACKLOG)
            own.replace(self._path)
            self._log.info("listening", extra={"socket": str(self._path)})
            await self._server.serve(sockets=[listening])
        raise RuntimeError(f"the server at {self._path} ended")


class Served:
    """Base of a Serve deployment that listens while its replica is alive."""

    def __init__(self, app: ASGIApp, path: Path, log: logging.Logger) -> None:
        self._log = log
        self._serving = asyncio.create_task(Listener(app, path, log).serve())

    def check_health(self) -> None:
        """Serve's health check; a part that no longer listens must be replaced."""
        if self._serving.done():
            self._log.critical("listener-broken", exc_info=self._serving.exception())
            raise RuntimeError("its server ended")
