"""The ingress's own socket: whose it is, who leaves, how much it takes, and that every failure is JSON."""

from __future__ import annotations

import asyncio
import logging
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from serve.ingress.http import Places, application
from serve.ingress.listener import Listener, Served

EDGE = {"x-gateway-edge": "s"}


class Holding:
    """An endpoint that answers when it is let; sees who left."""

    def __init__(self) -> None:
        self.held, self.left, self.go = 0, 0, asyncio.Event()

    async def __call__(self, request: Request) -> Response:
        await request.body()
        if request.query_params.get("fail"):
            raise KeyError("a mistake")
        self.held += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.left += 1
            raise
        finally:
            self.held -= 1
        return PlainTextResponse("done")


@asynccontextmanager
async def listening(holding: Holding, limit: int = 100) -> AsyncIterator[tuple[Path, httpx.AsyncClient]]:
    async def hold(request: Request) -> Response:
        return await holding(request)

    app = application([Route("/x", hold, methods=["POST"])], "s", Middleware(Places, limit=limit))
    with tempfile.TemporaryDirectory(prefix="gwl-", dir="/tmp") as folder:
        path = Path(folder) / "ingress.sock"
        serving = asyncio.create_task(Listener(app, path, logging.getLogger("gateway.ingress")).serve())
        async with asyncio.timeout(10):
            while not path.exists():
                await asyncio.sleep(0.01)
        transport = httpx.AsyncHTTPTransport(uds=str(path), retries=3)
        async with httpx.AsyncClient(transport=transport, base_url="http://ingress", headers=EDGE) as client:
            yield path, client
        serving.cancel()
        await asyncio.wait({serving})


async def until_held(holding: Holding, count: int) -> None:
    async with asyncio.timeout(10):
        while holding.held != count:
            await asyncio.sleep(0.01)


async def test_the_socket_is_its_users_alone_and_nothing_else_is_left() -> None:
    async with listening(Holding()) as (path, _):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [other.name for other in path.parent.iterdir()] == [path.name]


async def test_a_client_that_leaves_ends_its_request() -> None:
    holding = Holding()
    async with listening(holding) as (_, client):
        request = asyncio.create_task(client.post("/x", content=b"body"))
        await until_held(holding, 1)
        request.cancel()
        await until_held(holding, 0)
    assert holding.left == 1


async def test_one_request_too_many_is_refused_with_the_limit_and_places_come_back() -> None:
    holding = Holding()
    async with listening(holding, limit=2) as (_, client):
        held = [asyncio.create_task(client.post("/x")) for _ in range(2)]
        await until_held(holding, 2)
        refused = await client.post("/x")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "relay_full")
        assert "has 2 requests" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        holding.go.set()
        assert [response.text for response in await asyncio.gather(*held)] == ["done", "done"]
        assert (await client.post("/x")).text == "done"


async def test_a_mistake_of_ours_is_json() -> None:
    async with listening(Holding()) as (_, client):
        response = await client.post("/x?fail=1")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")


async def test_a_part_whose_server_has_ended_is_not_healthy() -> None:
    with tempfile.TemporaryDirectory(prefix="gwl-", dir="/tmp") as folder:
        path = Path(folder) / "none" / "desk.sock"  # no such folder: it cannot listen
        part = Served(application([], "s"), path, logging.getLogger("gateway.desk"))
        part.check_health()
        await asyncio.wait({part._serving})
        with pytest.raises(RuntimeError, match="its server ended"):
            part.check_health()
