"""How the ingress looks from the edge, which cannot otherwise tell its answers from those of Serve's proxy before it.

The edge has the same names (``gateway_plugin.edge.apart``); a test holds them equal.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

AROUND = "x-gateway-around"
"""On a request that went round an ingress that was away, and may have been on an engine."""

DISGUISE = {500: 550, 503: 553}
"""Statuses that Serve's proxy uses for what it says itself -> what the ingress says instead; the edge undoes it."""


class Disguised:
    """ASGI middleware: no status of the ingress is one that Serve's proxy uses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def disguise(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "status": DISGUISE.get(message["status"], message["status"])}
            await send(message)

        await self._app(scope, receive, disguise)
