"""A controller's handle as the ingress uses it, with scripted results of ``acquire``, in order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any

from ray.exceptions import ActorDiedError

from gateway_plugin.errors import GatewayError
from serve.core.events import Requester

Granting = Callable[[], Awaitable[GatewayError | None]]


class Response:
    """Like Serve's ``DeploymentResponse``: awaitable and cancellable."""

    def __init__(self, work: Awaitable[Any]) -> None:
        self._task = asyncio.ensure_future(work)
        self.cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        return self._task.__await__()

    def cancel(self) -> None:
        self.cancelled = True
        self._task.cancel()


class _Verb:
    def __init__(self, call: Callable[..., Awaitable[Any]], responses: list[Response]) -> None:
        self._call = call
        self._responses = responses

    def remote(self, *arguments: Any) -> Response:
        response = Response(self._call(*arguments))
        self._responses.append(response)
        return response


class ScriptedController:
    """Answers ``acquire`` from ``grants`` (the last one again and again); every verb returns what it is given."""

    def __init__(self, *grants: GatewayError | type[BaseException] | float | None, **verbs: Any) -> None:
        self.grants = list(grants) or [None]
        self.deaths: list[float] = []
        self.apart_since: float | None = None
        self.hang_after_s = 300.0
        self.outlook_now: dict[str, Any] = {"state": "loading", "eta_s": 12.0, "reason": None}
        self.asked: list[tuple[str, bool]] = []
        self.requesters: list[Requester] = []
        self.deadlines: list[float | None] = []
        self.told: list[tuple[str, tuple[Any, ...]]] = []
        self.responses: list[Response] = []
        self._verbs = verbs

    def __getattr__(self, name: str) -> _Verb:
        if name == "acquire":
            return _Verb(self._acquired, self.responses)
        if name == "outlook":
            return _Verb(self._outlook, self.responses)
        if name in ("answered", "suspects"):
            return _Verb(lambda *arguments: self._hear(name, arguments), self.responses)
        return _Verb(lambda *arguments: self._verb(name, arguments), self.responses)

    async def _acquired(self, *arguments: Any) -> GatewayError | None:
        *call, requester, deadline_s = arguments
        self.requesters.append(requester)
        self.deadlines.append(deadline_s)
        return await self._acquire(*call)

    async def _acquire(
        self, ticket: str, model: str, wait_s: float, not_routed: bool, unattended: bool = False
    ) -> GatewayError | None:
        self.asked.append((model, not_routed))
        grant = self.grants.pop(0) if len(self.grants) > 1 else self.grants[0]
        if isinstance(grant, float):
            await asyncio.sleep(grant)
            grant = None
        if isinstance(grant, type):
            raise ActorDiedError() if grant is ActorDiedError else grant()
        return grant

    async def _outlook(self, model: str) -> dict[str, Any]:
        history = {"deaths": list(self.deaths), "apart_since": self.apart_since, "hang_after_s": self.hang_after_s}
        return {"name": model, **self.outlook_now, **history}

    async def _hear(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.told.append((name, arguments))

    async def _verb(self, name: str, arguments: tuple[Any, ...]) -> Any:
        self.told.append((name, arguments))
        answer = self._verbs[name]
        if isinstance(answer, type):
            raise answer()
        return answer
