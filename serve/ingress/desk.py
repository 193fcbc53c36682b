"""The desk: status, the catalog, metrics and administration, in a process of its own.

Apart from the ingress, so that a thousand answers that pass there do not delay an administrator. It answers only
requests with the edge's secret, and takes the caller's name and role from the edge.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway_plugin.errors import Forbidden, GatewayError, InvalidRequest
from gateway_plugin.logs import log_events
from gateway_plugin.paths import Layout
from gateway_plugin.site import Limits
from serve.ingress.body import DOCUMENT_BYTES, parse_document, read_bounded
from serve.ingress.http import application, edge_secret
from serve.ingress.inference import is_admin
from serve.ingress.listener import Served
from serve.ingress.listing import card, cards
from serve.ingress.waiting import LOST

log = logging.getLogger("gateway.desk")

_CONTROLLER_S = 10.0
_APPLY_S = 150.0
"""For a new catalog: engines that serve may first load adapters (``serve.controller.adapters``)."""

_VERBS = ("load", "unload", "pin", "unpin")
Endpoint = Callable[[Request], Awaitable[Response]]


class Desk:
    """The desk's routes; stateless."""

    def __init__(self, state: str, limits: Limits, controller: Any) -> None:
        layout = Layout.of(Path(state))
        log_events("gateway.desk", layout.desk_log)
        self._limits = limits
        self._controller = controller
        self._secret = edge_secret(layout)

    def application(self) -> Starlette:
        """The routes."""
        return application(
            [
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/ready", self._ready),
                Route("/metrics", _admin_only(self._metrics)),
                Route("/gateway/v1/status", _admin_only(self._status)),
                Route("/gateway/v1/blocks", _admin_only(self._blocks)),
                self._order("blocks/drain", "block", "drain_block"),
                self._order("blocks/cancel", "block", "cancel_block"),
                self._order("blocks/retry", "type", "retry_blocks"),
                Route("/gateway/v1/close", _admin_only(self._close), methods=["POST"]),
                Route("/gateway/v1/models/why", _admin_only(self._why)),
                Route("/gateway/v1/models/apply", _admin_only(self._apply), methods=["POST"]),
                *(self._order(f"models/{verb}", "model", "administer", verb) for verb in _VERBS),
            ],
            self._secret,
        )

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": cards(await self._ask("models", is_admin(request.headers)))})

    async def _model(self, request: Request) -> Response:
        entries = await self._ask("models", is_admin(request.headers))
        return JSONResponse(card(entries, request.path_params["name"]))

    async def _ready(self, request: Request) -> Response:
        found = await self._ask("ready")
        ready = found["ready"]
        return JSONResponse(found, 200 if ready else 503, None if ready else {"Retry-After": "1"})

    async def _metrics(self, request: Request) -> Response:
        return Response(await self._ask("metrics"), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _status(self, request: Request) -> Response:
        return JSONResponse(await self._ask("status"))

    async def _why(self, request: Request) -> Response:
        model = request.query_params.get("model", "")
        if not model:
            raise InvalidRequest("Name the model: /gateway/v1/models/why?model=NAME.")
        return JSONResponse(await self._ask("why", model))

    async def _blocks(self, request: Request) -> Response:
        ended = request.query_params.get("all", "").lower() in ("1", "true", "yes")
        return JSONResponse({"blocks": await self._ask("blocks", ended)})

    def _order(self, path: str, key: str, *order: str) -> Route:
        """An administrator's order to the controller, about what the document's ``key`` names."""

        async def endpoint(request: Request) -> Response:
            return await self._done(*order, _text(await self._document(request), key))

        return Route(f"/gateway/v1/{path}", _admin_only(endpoint), methods=["POST"])

    async def _close(self, request: Request) -> Response:
        return await self._done("refuse_waiters")

    async def _apply(self, request: Request) -> Response:
        return await self._done("apply", await self._document(request))

    async def _done(self, verb: str, *arguments: Any) -> Response:
        await self._ask(verb, *arguments)
        return JSONResponse({"ok": True})

    async def _ask(self, verb: str, *arguments: Any) -> Any:
        """One call to the controller. Raises the error that it returns, or ``GatewayError`` (503) while it is away."""
        response = getattr(self._controller, verb).remote(*arguments)
        try:
            found = await asyncio.wait_for(response, _APPLY_S if verb == "apply" else _CONTROLLER_S)
        except (TimeoutError, *LOST) as error:
            log.warning("controller-away", extra={"verb": verb, "error": type(error).__name__})
            raise _ControllerAway(
                "The gateway's controller restarts; warm models go on answering. Try again.",
                retry_after_s=2.0,
                state="restarting",
            ) from error
        if isinstance(found, GatewayError):
            raise found
        return found

    async def _document(self, request: Request) -> Any:
        body = await read_bounded(request, min(self._limits.body_bytes, DOCUMENT_BYTES))
        return await asyncio.to_thread(parse_document, body)


class ServedDesk(Served):
    """The desk as a Serve deployment."""

    def __init__(self, state: str, limits: Limits, controller: Any, ingress: Any) -> None:
        """``ingress``: an argument so that Serve deploys it with the desk; never called."""
        super().__init__(Desk(state, limits, controller).application(), Layout.of(Path(state)).desk_socket, log)


class _ControllerAway(GatewayError):
    """The controller does not answer."""

    status, code, exit_code = 503, "controller_restarting", 75


def _admin_only(endpoint: Endpoint) -> Endpoint:
    async def guarded(request: Request) -> Response:
        if not is_admin(request.headers):
            raise Forbidden("This needs an admin key.")
        return await endpoint(request)

    return guarded


def _text(document: Any, key: str) -> str:
    value = document.get(key) if isinstance(document, dict) else None
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"Expected a JSON object with the key '{key}'.")
    return value
