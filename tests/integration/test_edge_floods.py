"""Floods at the edge: waiters and strangers, each more than it has places for. Small limits, the same rules."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import httpx
import psutil
import pytest

from gateway_plugin.edge.keys import KeyStore
from gateway_plugin.edge.places import Places, places
from gateway_plugin.site import Limits
from tests.support.edges import Edge, chat, running_edge, until

pytestmark = pytest.mark.integration

FILES = 1000
SLOTS, SERVERS = 4, 3
SLOW_S = 4.5
"""A second is promised; clients, edge, ingress and engine share a machine here, with other tests. A wait for a place
that is not given back takes 5 s and more."""
PLACES: Places = places(FILES, 1000, SLOTS, SERVERS)
OF_ONE_KEY = PLACES.of_one_key(Limits().in_flight_per_key)


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge(slots=SLOTS, servers_per_slot=SERVERS, open_files=FILES) as running:
        await running.add_engine("tiny")
        yield running


@dataclass
class Probes:
    """How long health and a warm model took to answer, each time on a new connection, and on one that is kept."""

    slowest_s: float = 0.0
    count: int = 0
    wrong: list[str] = field(default_factory=list)

    async def run(self, edge: Edge) -> None:
        """Until cancelled."""
        async with edge.client() as kept:
            while True:
                await self._probe("health", lambda: _health(edge))
                await self._probe("warm", lambda: edge.ask("tiny", "hello"))
                await self._probe("warm, kept", lambda: kept.post("/v1/chat/completions", json=chat("tiny", "hello")))
                await asyncio.sleep(0.02)

    async def _probe(self, what: str, ask: Callable[[], Awaitable[httpx.Response]]) -> None:
        began = time.monotonic()
        try:
            status = (await ask()).status_code
        except httpx.TransportError as error:
            self.wrong.append(f"{what}: {error!r}")
        else:
            if status != 200:
                self.wrong.append(f"{what}: {status}")
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        self.count += 1


async def _health(edge: Edge) -> httpx.Response:
    async with edge.client("") as nobody:
        return await nobody.get("/health")


@contextlib.asynccontextmanager
async def probed(edge: Edge) -> AsyncIterator[None]:
    """What happens inside slows nobody: health and warm requests answer all the time."""
    probes = Probes()
    running = asyncio.create_task(probes.run(edge))
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait({running})
    assert probes.wrong == []
    assert probes.count >= 3
    assert probes.slowest_s < SLOW_S


_COLD = json.dumps(chat("cold", "hello")).encode()


async def waiter(edge: Edge, key: str, body: bytes = _COLD) -> tuple[int, bytes, float]:
    """One request, for a model that is not loaded, on a connection of its own: status, answer, seconds."""
    began = time.monotonic()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: e\r\nx-api-key: {key}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.site.port)
    writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
    said = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in said.lower().splitlines() if line.startswith(b"content-length:"))
    answer = await reader.readexactly(length)
    writer.close()
    return int(said.split()[1]), answer, time.monotonic() - began


@pytest.mark.parametrize("model", ["no-slot", "slot", "draining"])
async def test_waiters_more_than_can_be_answered(edge: Edge, model: str) -> None:
    """As many as fit wait and are answered, in the end through the inner door; the rest is told so at once."""
    edge.loaded = asyncio.Event()
    if model == "draining":
        engine = await edge.add_engine("cold")
        await edge.runtime.drain(engine.slot, engine.server)
    elif model == "slot":
        edge.names["cold"] = 1
        await edge.runtime.sync_slots(edge.names, (1,))
    many = PLACES.cold + 400
    assert many > PLACES.callers, "more than there are places at the front door"
    store = KeyStore(edge.layout)
    keys = [await asyncio.to_thread(store.create, f"user{n}", "user") for n in range(many // OF_ONE_KEY + 1)]
    async with probed(edge):
        waiters = [asyncio.create_task(waiter(edge, keys[n % len(keys)])) for n in range(many)]

        async def all_but_those_that_fit() -> bool:
            return sum(task.done() for task in waiters) >= many - PLACES.cold

        await until(all_but_those_that_fit, "the others are refused", within_s=5.0)
        await asyncio.sleep(0.5)
        refused = [task.result() for task in waiters if task.done()]
        assert len(refused) == many - PLACES.cold, "and nobody else"
        assert len([request for request in edge.cold if b"cold" in request.body]) == PLACES.cold
        for status, answer, _ in refused:
            assert status == 503
            assert json.loads(answer)["error"]["state"] == "overloaded"
        async with edge.client(edge.admin_key) as admin:
            assert (await admin.get("/gateway/v1/status")).status_code == 200, "administration has places of its own"
        await edge.add_engine("cold")
        edge.loaded.set()
        answered = await asyncio.wait_for(asyncio.gather(*waiters), 60)
    assert Counter(status for status, _, _ in answered) == {200: PLACES.cold, 503: many - PLACES.cold}


async def test_one_key_leaves_places_to_others(edge: Edge) -> None:
    """Also where open files are few, and the site allows a key more than there are."""
    assert edge.site.limits.in_flight_per_key > PLACES.cold
    edge.loaded = asyncio.Event()
    waiters = [asyncio.create_task(waiter(edge, edge.user_key)) for _ in range(PLACES.cold + 20)]

    async def others_are_told() -> bool:
        return sum(task.done() for task in waiters) >= PLACES.cold + 20 - OF_ONE_KEY

    await until(others_are_told, "the others are refused", within_s=5.0)
    assert {task.result()[0] for task in waiters if task.done()} == {429}
    other = asyncio.create_task(waiter(edge, edge.admin_key))

    async def waits_too() -> bool:
        return len(edge.cold) == OF_ONE_KEY + 1

    await until(waits_too, "another key's request waits with them", within_s=5.0)
    await edge.add_engine("cold")
    edge.loaded.set()
    assert (await other)[0] == 200
    assert Counter(status for status, _, _ in await asyncio.gather(*waiters))[200] == OF_ONE_KEY


async def test_one_model_leaves_places_to_others(edge: Edge) -> None:
    """A flood of requests for a model that is loaded, more than it may have in flight: the others answer as ever."""
    await edge.add_engine("slow")
    many = PLACES.of_one_model + 30
    store = KeyStore(edge.layout)
    keys = [await asyncio.to_thread(store.create, f"user{n}", "user") for n in range(many // OF_ONE_KEY + 1)]
    body = json.dumps(chat("slow", "@sleep=4")).encode()
    async with probed(edge):
        asked = [asyncio.create_task(waiter(edge, keys[n % len(keys)], body)) for n in range(many)]
        answers = Counter(status for status, _, _ in await asyncio.wait_for(asyncio.gather(*asked), 60))
    assert answers == {200: PLACES.of_one_model, 503: 30}


@dataclass
class Strangers:
    """Connections that say nothing, each made again as soon as it is closed."""

    edge: Edge
    opened: int = 0

    async def hold(self, count: int) -> None:
        """Until cancelled."""
        await asyncio.gather(*(self._one() for _ in range(count)))

    async def _one(self) -> None:
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.edge.site.port)
            self.opened += 1
            try:
                await reader.read()
            except ConnectionError:
                await asyncio.sleep(0.1)
            finally:
                writer.close()


@contextlib.asynccontextmanager
async def strangers(edge: Edge, count: int) -> AsyncIterator[Strangers]:
    made = Strangers(edge)
    holding = asyncio.create_task(made.hold(count))
    try:
        yield made
    finally:
        holding.cancel()
        await asyncio.wait({holding})


async def test_idle_connections_are_short_lived_and_leave_places(edge: Edge) -> None:
    count = PLACES.callers - 10
    async with strangers(edge, count) as held, probed(edge):

        async def reopened() -> bool:
            return held.opened > count

        await until(reopened, "connections without a request are closed", within_s=7)
        await asyncio.sleep(0.5)
        assert held.opened <= 2 * count, "after some seconds, not at once"


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ("POST /v1/completions", ""),
        ("POST /v1/completions", "gw-wrong"),
        ("GET /health", ""),
        ("POST /v1/completions", "admin"),
    ],
    ids=["no-key", "unknown-key", "not-plain", "key-past-its-limit"],
)
async def test_who_is_refused_and_goes_on_sending_takes_few_places(edge: Edge, asked: str, key: str) -> None:
    let_in = OF_ONE_KEY if key == "admin" else 0
    key = edge.admin_key if key == "admin" else key
    head = f"{asked} HTTP/1.1\r\nhost: e\r\nx-api-key: {key}\r\ncontent-length: 100000000\r\n\r\n"

    async def sender() -> bytes:
        """What it was told, once it is closed."""
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.site.port)
        try:
            writer.write(head.encode())
            return await reader.read()
        finally:
            writer.close()

    senders = [asyncio.create_task(sender()) for _ in range(PLACES.callers)]

    def told() -> list[bytes]:
        return [task.result() for task in senders if task.done()]

    async def most() -> bool:
        return len(told()) >= PLACES.callers - PLACES.refused - let_in

    try:
        await until(most, "most are closed", within_s=5)
        async with probed(edge):
            await asyncio.sleep(0.5)
        assert len(told()) == PLACES.callers - PLACES.refused - let_in, "the others may send on"
        assert {said.split()[1] for said in told()} <= {b"400", b"401", b"429"}
    finally:
        for task in senders:
            task.cancel()
        await asyncio.wait(senders)


async def test_one_address_of_others_cannot_take_all_places(edge: Edge) -> None:
    """Past its share its connections are closed at once: nobody is kept waiting behind them."""
    addresses = (address for known in psutil.net_if_addrs().values() for address in known)
    other = next((a.address for a in addresses if a.family is socket.AF_INET and a.address != "127.0.0.1"), None)
    if other is None:
        pytest.skip("this machine has no address but 127.0.0.1")
    idle = []

    async def connect() -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.site.port, local_addr=(other, 0))
        idle.append(writer)
        return reader

    try:
        for _ in range(PLACES.per_source):
            await connect()
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for((await connect()).read(), 4) == b""
        async with probed(edge):
            await asyncio.sleep(0.5)
    finally:
        for writer in idle:
            writer.close()


async def test_an_answer_without_a_key_ends_its_connection(edge: Edge) -> None:
    wrong = "authorization: Bearer gw-wrong\r\n"
    for path, headers, status in (
        ("/health", "", 200),
        ("/ready", "", 200),
        ("/v1/models", "", 401),
        ("/v1/models", wrong, 401),
        ("/nothing", "", 401),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.site.port)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: e\r\n{headers}\r\n".encode())
        said = await asyncio.wait_for(reader.read(), 4)  # to the end: it is closed
        writer.close()
        assert said.startswith(b"HTTP/1.1 %d " % status)
        assert b"connection: close" in said.lower()
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.site.port)
    for _ in range(2):  # with a key it stays
        writer.write(f"GET /v1/models HTTP/1.1\r\nhost: e\r\nx-api-key: {edge.user_key}\r\n\r\n".encode())
        assert b"connection: close" not in (await reader.readuntil(b"}")).lower()
    writer.close()


async def test_readiness_is_asked_for_once_a_second_whoever_asks(edge: Edge) -> None:
    began = time.monotonic()
    async with edge.client("") as nobody:
        assert (await nobody.get("/ready")).status_code == 200
        answers = await asyncio.gather(
            *(nobody.get(f"/ready?x={n}", headers={"host": f"h{n}", "x-gateway-role": "admin"}) for n in range(30))
        )
        assert {answer.status_code for answer in answers} == {200}
        assert len([asked for asked in edge.cold if asked.path == "/ready"]) <= 2 + time.monotonic() - began
        edge.ready_status = 503
        await asyncio.sleep(1.2)
        assert (await nobody.get("/ready")).status_code == 503, "a yes is good for a second only"


@pytest.mark.parametrize(
    "asked",
    [
        "GET /ready HTTP/1.1\r\nhost: e\r\ncache-control: no-cache",
        "GET /ready HTTP/1.1\r\nhost: e\r\npragma: no-cache",
        "GET /ready HTTP/1.1\r\nhost: e\r\nauthorization: Bearer gw-x",
        "GET /ready HTTP/1.0",
        "HEAD /ready HTTP/1.1\r\nhost: e",
    ],
)
async def test_nothing_that_a_stranger_writes_passes_by_what_was_said_of_readiness(edge: Edge, asked: str) -> None:
    began = time.time()
    for _ in range(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.site.port)
        writer.write(f"{asked}\r\n\r\n".encode())
        said = await asyncio.wait_for(reader.read(), 5)  # to the end: it is closed
        writer.close()
        assert said.split()[1] == b"200"
        assert said.endswith(b"\r\n\r\n") == asked.startswith("HEAD"), "an answer to HEAD has no body"
    assert 1 <= len(edge.cold) <= 2 + time.time() - began
    assert {name for name, _ in edge.cold[0].headers} <= {"host", "x-gateway-edge", "connection", "content-length"}


async def test_one_asks_again_for_all_who_come_meanwhile(edge: Edge) -> None:
    async with edge.client("") as nobody:
        assert (await nobody.get("/ready")).status_code == 200
        edge.ready_takes_s, said_at = 0.3, int(time.time())
        began = time.monotonic()

        async def next_second() -> bool:
            return int(time.time()) > said_at

        await until(next_second, "what was said is out of date")
        again = asyncio.create_task(nobody.get("/ready"))

        async def asked() -> bool:
            return len(edge.cold) == 2

        await until(asked, "one asks")
        answers = await asyncio.gather(*(nobody.get("/ready") for _ in range(20)), again)
        assert {answer.status_code for answer in answers} == {200}
        assert len(edge.cold) <= 3 + time.monotonic() - began, "a second may end meanwhile"
        edge.ready_status, edge.ready_takes_s = 503, 0.0
        await asyncio.sleep(1.2)
        assert [(await nobody.get("/ready")).status_code for _ in range(3)] == [503] * 3, "a no is nobody's yes"


async def test_a_gateway_that_is_not_ready_is_asked_by_few_at_a_time(edge: Edge) -> None:
    edge.ready_status, edge.ready_takes_s = 503, 1.0
    limits = httpx.Limits(max_connections=200)
    async with edge.client("", limits=limits) as nobody, probed(edge):
        answers = await asyncio.gather(*(nobody.get("/ready") for _ in range(150)))
    assert {answer.status_code for answer in answers} == {503}
    assert len(edge.cold) == 32
    refused = [answer for answer in answers if "overloaded" in answer.text]
    assert len(refused) == 150 - 32
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
