"""The ingress: inference requests that the edge cannot route by itself, for cold models and with large bodies.

It answers only requests with the edge's secret. It listens by itself (``serve.ingress.listener``); status and
administration are the desk's (``serve.ingress.desk``), a process of its own.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway_plugin.errors import Forbidden, GatewayError, NotFound, NotRouted, RelayFull, ServiceError
from gateway_plugin.logs import log_events
from gateway_plugin.passing import INFERENCE, NOT_ROUTED
from gateway_plugin.paths import Layout
from gateway_plugin.site import Limits
from serve.ingress.budget import Budget
from serve.ingress.inference import Inference, is_admin
from serve.ingress.listener import Served, requests_max
from serve.ingress.relay import STAMP, Relay
from serve.ingress.waiting import LOST, Waiting

log = logging.getLogger("gateway.ingress")

_CHECK_S = 3.0


class EdgeOnly:
    """ASGI middleware: refuses requests without the edge's secret."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app = app
        self._secret = secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            shown = dict(scope["headers"]).get(b"x-gateway-edge", b"")
            if not hmac.compare_digest(shown, self._secret):
                error = Forbidden("This socket is the gateway's own; use its front door.")
                await JSONResponse(error.body(), error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Places:
    """ASGI middleware: limits concurrent inference requests, from their first byte to the last of their answer.

    Stamped ones are not counted: they are answered at once, and another request waits for that.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._taken = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or any(name == STAMP.encode() for name, _ in scope["headers"])
        ):
            await self._app(scope, receive, send)
            return
        if self._taken >= self._limit:
            error = RelayFull(self._limit)
            await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send)
            return
        self._taken += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._taken -= 1


class Ingress:
    """The ingress's routes and what they need."""

    def __init__(self, state: str, limits: Limits, controller: Any) -> None:
        self._controller = controller
        layout = Layout.of(Path(state))
        log_events("gateway.ingress", layout.ingress_log)
        self._secret = edge_secret(layout)
        self._requests_max = requests_max(limits.relayed_requests)
        relay = Relay(layout.inner_door)
        budget = Budget(limits.held_bytes, limits.held_bytes_per_key)
        self._inference = Inference(Waiting(controller, limits.wait_s), relay, limits.body_bytes, budget)

    def application(self) -> Starlette:
        """The routes."""
        return application(
            [Route("/check", self._check), *(Route(path, self._infer, methods=["POST"]) for path in INFERENCE)],
            self._secret,
            Middleware(Places, limit=self._requests_max),
        )

    async def _check(self, request: Request) -> Response:
        """The edge's health check, by which it avoids an unusable ingress."""
        try:
            found = await asyncio.wait_for(self._controller.ready.remote(), _CHECK_S)
        except (TimeoutError, *LOST):
            found = {"ready": False}
        return JSONResponse(found, 200 if found["ready"] else 503)

    async def _infer(self, request: Request) -> Response:
        if STAMP in request.headers:  # it came in through the inner door: never wait or forward again
            error = NotRouted("No engine could take the request.", retry_after_s=1.0, state="not_routed")
            return JSONResponse(error.body(), error.status, {**error.headers(), NOT_ROUTED: "1"})
        return await self._inference.handle(request)


class ServedIngress(Served):
    """The ingress as a Serve deployment."""

    def __init__(self, state: str, limits: Limits, controller: Any) -> None:
        application = Ingress(state, limits, controller).application()
        super().__init__(application, Layout.of(Path(state)).ingress_socket, log)


def edge_secret(layout: Layout) -> str:
    """The edge's secret. Raises ``ServiceError`` where it is empty: every request would match that."""
    secret = layout.edge_secret.read_text().strip()
    if not secret:
        raise ServiceError(f"{layout.edge_secret} is empty; 'gateway down' and 'up' makes it anew.")
    return secret


def application(routes: list[Route], secret: str, *middleware: Middleware) -> Starlette:
    """An application of the ingress or the desk: for the edge alone, every error in OpenAI's form."""
    return Starlette(
        routes=routes,
        middleware=[Middleware(EdgeOnly, secret=secret), *middleware],
        exception_handlers={
            GatewayError: _gateway_error,
            404: _no_such_path,
            405: _no_such_path,
            Exception: _unforeseen,
        },
    )


async def _gateway_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    return JSONResponse(error.body(detail=is_admin(request.headers)), error.status, error.headers())


async def _no_such_path(request: Request, error: Exception) -> Response:
    return await _gateway_error(request, NotFound(f"There is no {request.method} {request.url.path} here."))


async def _unforeseen(request: Request, error: Exception) -> Response:
    """An internal error: Starlette raises it again, so that it is logged."""
    said = GatewayError("The gateway failed on this request; its log says more ('gateway logs').")
    return JSONResponse(said.body(), said.status)
