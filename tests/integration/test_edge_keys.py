"""A revoked key at a running edge: what it has in flight, an edge that is late, one that was told nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from gateway_plugin.edge.keys import CLI_KEY_NAME, KeyStore
from gateway_plugin.edge.socket_protocol import ask
from gateway_plugin.errors import EdgeError
from tests.support.edges import Edge, chat, running_edge, until
from tests.support.raw_http import Exchange, listen

pytestmark = pytest.mark.integration

BOUND_S = 5.0
"""Within which requests of a revoked key end, as documented."""


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge() as running:
        yield running


async def status(edge: Edge, key: str) -> int:
    async with edge.client(key) as client:
        return (await client.get("/v1/models")).status_code


async def endless(edge: Edge, key: str, model: str) -> str:
    """Ask for a stream that takes a minute; how it ended."""
    body = chat(model, "go on", stream=True)
    try:
        async with edge.client(key) as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for _ in answer.aiter_bytes():
                pass
            return f"whole, {answer.status_code}"
    except httpx.TransportError as error:
        return type(error).__name__


class HoldingIngress:
    """In place of the ingress: holds what comes, as for a cold model, and sees who leaves."""

    def __init__(self) -> None:
        self.held = 0

    def __call__(self, exchange: Exchange) -> object:
        return self._hold()

    async def _hold(self) -> None:
        self.held += 1
        try:
            await asyncio.sleep(60)
        finally:
            self.held -= 1

    async def put_before(self, edge: Edge) -> None:
        edge.stop_ingress()
        edge.ingress = await listen(self, "", 0, uds=str(edge.layout.ingress_socket))  # type: ignore[arg-type]


async def test_revoking_ends_what_the_key_has_in_flight_and_nothing_else(edge: Edge) -> None:
    store = KeyStore(edge.layout)
    gone = store.create("gone", "user")
    await edge.add_engine("tiny", "--tokens", "600", "--token-rate", "10")
    ingress = HoldingIngress()
    await ingress.put_before(edge)
    mine = [asyncio.create_task(endless(edge, gone, model)) for model in ("tiny", "tiny", "cold", "cold")]
    others = [asyncio.create_task(endless(edge, edge.user_key, model)) for model in ("tiny", "cold")]

    async def all_under_way() -> bool:
        return ingress.held == 3 and sum(stat.in_flight for stat in await edge.runtime.servers()) == 3

    await until(all_under_way, "three stream, three wait")
    await asyncio.sleep(1.5)  # the edge forgets requests that have ended after 1 s, and these have not
    began = time.monotonic()
    await asyncio.to_thread(store.revoke, "gone")
    took_s = time.monotonic() - began
    ended, _ = await asyncio.wait(mine, timeout=BOUND_S)
    assert len(ended) == 4
    assert {task.result() for task in mine[:2]} <= {"RemoteProtocolError", "ReadError"}  # broken off, visibly
    assert {task.result() for task in mine[2:]} == {"whole, 502"}
    assert took_s < BOUND_S

    async def only_the_others() -> bool:
        return ingress.held == 1 and sum(stat.in_flight for stat in await edge.runtime.servers()) == 1

    await until(only_the_others, "engine and ingress are rid of it", BOUND_S)
    assert await status(edge, gone) == 401
    assert not any(task.done() for task in others)
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def test_replacing_the_command_lines_key_cuts_the_old_one_only(edge: Edge) -> None:
    store = KeyStore(edge.layout)
    edge.layout.admin_key.unlink()
    store.keep_cli_key()
    old = edge.layout.admin_key.read_text()
    await edge.add_engine("tiny", "--tokens", "600", "--token-rate", "10")
    stream = asyncio.create_task(endless(edge, old, "tiny"))

    async def under_way() -> bool:
        return sum(stat.in_flight for stat in await edge.runtime.servers()) == 1

    await until(under_way, "it streams")
    await asyncio.to_thread(store.revoke, CLI_KEY_NAME)
    assert await asyncio.wait_for(stream, BOUND_S) in ("RemoteProtocolError", "ReadError")
    assert await status(edge, old) == 401
    assert await status(edge, edge.layout.admin_key.read_text()) != 401


async def test_an_edge_that_is_late_is_no_success_and_the_key_is_not_forgotten(edge: Edge) -> None:
    store = KeyStore(edge.layout)
    late = store.create("late", "user")
    impatient = pytest.MonkeyPatch()
    impatient.setattr("gateway_plugin.edge.keys.ask", lambda path, command: ask(path, command, 0.3))
    assert edge.child is not None
    os.kill(edge.child.pid, signal.SIGSTOP)
    try:
        for _ in range(2):
            with pytest.raises(EdgeError, match=r"'late' may still be in use.*'gateway keys list'"):
                await asyncio.to_thread(store.revoke, "late")
        with pytest.raises(EdgeError, match="'new' was not made"):
            await asyncio.to_thread(store.create, "new", "user")
        assert {key.name: key.revoked for key in store.list()} == {"ann": False, "root": False, "late": True}
    finally:
        os.kill(edge.child.pid, signal.SIGCONT)
        impatient.undo()
    await asyncio.to_thread(store.keep_in_force)  # as the supervisor does every second
    assert await status(edge, late) == 401
    assert [key.name for key in store.list()] == ["ann", "root"]
    names = set(edge.socket(f"show map {edge.layout.keys_map}").split()[2::3])
    assert names == {"user:ann", "admin:root"}


async def test_an_edge_without_its_socket_is_waited_for(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs, with the keys that it read, and cannot be told: as between its start and its socket."""
    monkeypatch.setattr("gateway_plugin.edge.keys._PATIENCE_S", 0.5)
    store = KeyStore(edge.layout)
    early = store.create("early", "user")
    aside = edge.layout.edge_socket.with_suffix(".aside")
    edge.layout.edge_socket.rename(aside)
    with pytest.raises(EdgeError, match=f"PID {edge.child.pid if edge.child else 0}"):
        await asyncio.to_thread(store.revoke, "early")
    assert await status(edge, early) == 200
    monkeypatch.setattr("gateway_plugin.edge.keys._PATIENCE_S", 60.0)
    again = asyncio.create_task(asyncio.to_thread(store.revoke, "early"))
    await asyncio.sleep(0.3)
    assert not again.done()
    aside.rename(edge.layout.edge_socket)
    await again
    assert await status(edge, early) == 401


async def test_a_map_that_differs_is_put_right_both_ways(edge: Edge) -> None:
    store = KeyStore(edge.layout)
    stale = store.create("stale", "user")
    entry = next(line for line in edge.layout.keys_map.read_text().splitlines() if line.endswith("user:stale"))
    store.revoke("stale")
    path = edge.layout.keys_map
    (ann,) = (line.split()[0] for line in path.read_text().splitlines() if line.endswith("user:ann"))
    edge.socket(f"add map {path} {entry}")
    edge.socket(f"del map {path} {ann}")
    path.write_text(f"{entry}\n")
    assert (await status(edge, stale), await status(edge, edge.user_key)) == (200, 401)
    await edge.add_engine("tiny", "--tokens", "600", "--token-rate", "10")
    stream = asyncio.create_task(endless(edge, stale, "tiny"))

    async def under_way() -> bool:
        return sum(stat.in_flight for stat in await edge.runtime.servers()) == 1

    await until(under_way, "it streams")
    await asyncio.to_thread(store.keep_in_force)
    assert await asyncio.wait_for(stream, BOUND_S) in ("RemoteProtocolError", "ReadError")
    assert (await status(edge, stale), await status(edge, edge.user_key)) == (401, 200)
    assert "stale" not in path.read_text()
    assert "user:ann" in path.read_text()
