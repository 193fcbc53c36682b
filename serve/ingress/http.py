"""The ingress: what the edge cannot answer by itself. Cold models, the catalog, status and administration.

It answers only what carries the edge's secret, and takes the caller's name and role from the edge.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway_plugin.errors import Forbidden, GatewayError, InvalidRequest, ModelNotFound, NotFound, NotRouted
from gateway_plugin.layout import Layout
from gateway_plugin.logs import log_events
from gateway_plugin.site import Limits
from serve.ingress.body import DOCUMENT_BYTES, parse_document, read_bounded
from serve.ingress.budget import Budget
from serve.ingress.inference import Inference, is_admin
from serve.ingress.relay import NOT_ROUTED, STAMP, Relay
from serve.ingress.waiting import LOST, Waiting

log = logging.getLogger("gateway.ingress")

_CONTROLLER_S = 10.0

INFERENCE_PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages",
    "/v1/messages/count_tokens", "/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/pooling",
    "/tokenize", "/detokenize",
)  # fmt: skip
"""The edge has the same list (``gateway_plugin.edge.front``); a test holds them equal."""


class EdgeOnly:
    """ASGI middleware: refuses what does not carry the edge's secret."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app = app
        self._secret = secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            shown = dict(scope["headers"]).get(b"x-gateway-edge", b"")
            if not hmac.compare_digest(shown, self._secret):
                error = Forbidden("This port is the gateway's own; use its front door.")
                await JSONResponse(error.body(), error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Ingress:
    """One Serve replica of it; stateless."""

    def __init__(self, state: str, limits: Limits, controller: Any) -> None:
        layout = Layout.of(Path(state))
        log_events("gateway.ingress", layout.logs / "ingress.log")
        self._limits = limits
        self._controller = controller
        self._secret = layout.edge_secret.read_text().strip()
        budget = Budget(limits.held_bytes, limits.held_bytes_per_key)
        relay = Relay(layout.inner_door)
        self._inference = Inference(Waiting(controller, limits.wait_s), relay, limits.body_bytes, budget)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve after the constructor (``serve.ingress()`` without an application)."""
        return self.application()

    def application(self) -> Starlette:
        """The routes."""
        return Starlette(
            routes=[
                *(Route(path, self._infer, methods=["POST"]) for path in INFERENCE_PATHS),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics),
                Route("/gateway/v1/status", self._status),
                Route("/gateway/v1/blocks", self._blocks),
                *(
                    Route(f"/gateway/v1/blocks/{verb}", self._end_block(f"{verb}_block"), methods=["POST"])
                    for verb in ("drain", "cancel")
                ),
                Route("/gateway/v1/blocks/retry", self._retry_blocks, methods=["POST"]),
                Route("/gateway/v1/models/apply", self._apply, methods=["POST"]),
                *(
                    Route(f"/gateway/v1/models/{verb}", self._administer(verb), methods=["POST"])
                    for verb in ("load", "unload", "pin", "unpin")
                ),
            ],
            middleware=[Middleware(EdgeOnly, secret=self._secret)],
            exception_handlers={GatewayError: _gateway_error, 404: _no_such_path, 405: _no_such_path},
        )

    async def _infer(self, request: Request) -> Response:
        if STAMP in request.headers:  # it came in through the inner door: never wait or forward again
            error = NotRouted("No engine could take the request.", retry_after_s=1.0, state="not_routed")
            return JSONResponse(error.body(), error.status, {**error.headers(), NOT_ROUTED: "1"})
        return await self._inference.handle(request)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": await self._ask("models", is_admin(request.headers))})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        entries: list[dict[str, Any]] = await self._ask("models", is_admin(request.headers))
        for entry in entries:
            if name == entry["id"] or name in entry["aliases"]:
                return JSONResponse(entry)
        raise ModelNotFound(name, tuple(entry["id"] for entry in entries))

    async def _ready(self, request: Request) -> Response:
        ready = await self._ask("ready")
        return JSONResponse({"ready": ready}, 200 if ready else 503, None if ready else {"Retry-After": "1"})

    async def _metrics(self, request: Request) -> Response:
        _admin_only(request)
        return Response(await self._ask("metrics"), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _status(self, request: Request) -> Response:
        _admin_only(request)
        return JSONResponse(await self._ask("status"))

    async def _blocks(self, request: Request) -> Response:
        _admin_only(request)
        ended = request.query_params.get("all", "").lower() in ("1", "true", "yes")
        return JSONResponse({"blocks": await self._ask("blocks", ended)})

    def _end_block(self, verb: str) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            _admin_only(request)
            return await self._done(verb, _text(await self._document(request), "block"))

        return endpoint

    async def _retry_blocks(self, request: Request) -> Response:
        _admin_only(request)
        return await self._done("retry_blocks", _text(await self._document(request), "type"))

    async def _apply(self, request: Request) -> Response:
        _admin_only(request)
        return await self._done("apply", await self._document(request))

    def _administer(self, verb: str) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            _admin_only(request)
            return await self._done("administer", verb, _text(await self._document(request), "model"))

        return endpoint

    async def _done(self, verb: str, *arguments: Any) -> Response:
        error = await self._ask(verb, *arguments)
        if isinstance(error, GatewayError):
            raise error
        return JSONResponse({"ok": True})

    async def _ask(self, verb: str, *arguments: Any) -> Any:
        """One call to the controller. Raises ``GatewayError`` (503) while it is away."""
        response = getattr(self._controller, verb).remote(*arguments)
        try:
            return await asyncio.wait_for(response, _CONTROLLER_S)
        except (TimeoutError, *LOST) as error:
            log.warning("controller-away", extra={"verb": verb, "error": type(error).__name__})
            raise _ControllerAway(
                "The gateway's controller restarts; warm models go on answering. Try again.",
                retry_after_s=2.0,
                state="restarting",
            ) from error

    async def _document(self, request: Request) -> Any:
        body = await read_bounded(request, min(self._limits.body_bytes, DOCUMENT_BYTES))
        return await asyncio.to_thread(parse_document, body)


class _ControllerAway(GatewayError):
    """The controller does not answer."""

    status, code, exit_code = 503, "controller_restarting", 75


def _admin_only(request: Request) -> None:
    if not is_admin(request.headers):
        raise Forbidden("This needs an admin key.")


def _text(document: Any, key: str) -> str:
    value = document.get(key) if isinstance(document, dict) else None
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"Expected a JSON object with the key '{key}'.")
    return value


async def _gateway_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    return JSONResponse(error.body(detail=is_admin(request.headers)), error.status, error.headers())


async def _no_such_path(request: Request, error: Exception) -> Response:
    return await _gateway_error(request, NotFound(f"There is no {request.method} {request.url.path} here."))
