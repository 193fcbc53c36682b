"""A real edge for tests: HAProxy on folders of its own, a stand-in ingress behind it, fake engines beside it.

async with running_edge() as edge:
    await edge.add_engine("tiny")
    answer = await edge.ask("tiny", "hello")
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from gateway_plugin.edge import process
from gateway_plugin.edge.apart import CHECK
from gateway_plugin.edge.keys import KeyStore
from gateway_plugin.edge.runtime import EdgeRuntime, ServerStat
from gateway_plugin.edge.socket_protocol import ask
from gateway_plugin.paths import Layout, write_private
from gateway_plugin.site import Limits, NodeType, Site
from gateway_plugin.tls import ENGINE_NAME, make_authority
from tests.support.clocks import SLACK
from tests.support.ports import free_port
from tests.support.raw_http import Connection, Exchange, Request, listen

ROOT = Path(__file__).resolve().parents[2]


class NoProvider:
    """A site must name a provider; the edge never asks it."""

    nodes_per_block = 1

    def submit(self) -> None:
        raise AssertionError("not for submitting")

    def status(self) -> None:
        raise AssertionError("not for asking")

    def cancel(self) -> None:
        raise AssertionError("not for cancelling")


def edge_site(
    port: int,
    limits: Limits | None = None,
    certificate: Path | None = None,
    cors_origins: tuple[str, ...] = (),
) -> Site:
    """A site with the settings that the edge reads."""
    return Site(
        name="edge",
        node_types=(NodeType(name="cpu", provider=NoProvider(), cpus=1, engine_memory_gib=1),),
        port=port,
        limits=limits or Limits(),
        certificate=certificate,
        plain_http=certificate is None,
        cors_origins=cors_origins,
    )


async def until(condition: Callable[[], Awaitable[bool]], what: str, within_s: float = 10.0) -> None:
    """Wait for ``condition``; fail with ``what`` when it does not come within ``SLACK`` times the deadline."""
    deadline = time.monotonic() + within_s * SLACK
    while not await condition():
        assert time.monotonic() < deadline, f"{what}: not within {within_s * SLACK} s"
        await asyncio.sleep(0.02)


@dataclass
class FakeEngine:
    """One fake engine process and its place at the edge."""

    child: subprocess.Popen[str]
    address: str
    slot: int
    server: int
    record: Path

    def kill(self) -> None:
        """As the out-of-memory killer would."""
        self.child.kill()
        self.child.wait()

    def seen(self) -> list[dict[str, Any]]:
        """The requests that it received: path, headers, body size of each, without health checks."""
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []


@dataclass
class Edge:
    """The edge under test and all that is around it."""

    layout: Layout
    site: Site
    user_key: str
    admin_key: str
    runtime: EdgeRuntime
    cold: list[Request] = field(default_factory=list)
    """Every request that reached the ingress."""
    cold_headers: tuple[tuple[str, str], ...] = ()
    """What the ingress adds to its answers."""
    cold_statuses: list[int] = field(default_factory=list)
    """Of its next answers; 200 when there are no more."""
    check_status: int = 200
    """Of the ingress's answer to the edge's check."""
    cold_hangs: bool = False
    """The ingress answers nothing but its check."""
    cold_connections: set[Connection] = field(default_factory=set)
    loaded: asyncio.Event | None = None
    """The ingress lets inference wait for this, and sends it back by the inner door then."""
    ready_status: int = 200
    """The ingress's answer to ``/ready``, after ``ready_takes_s``."""
    ready_takes_s: float = 0.0
    open_files: int | None = None
    """The edge's limit; that of the test if there is none."""
    engines: list[FakeEngine] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    child: subprocess.Popen[bytes] | None = None
    ingress: asyncio.AbstractServer | None = None
    desk: asyncio.AbstractServer | None = None

    async def start_ingress(self) -> None:
        """Listen where the ingress does."""
        self.layout.ingress_socket.unlink(missing_ok=True)
        self.ingress = await listen(self._ingress, "", 0, uds=str(self.layout.ingress_socket))

    def kill_ingress(self) -> None:
        """As ``kill -9`` of its process: its connections are cut."""
        self.stop_ingress()
        for connection in self.cold_connections:
            connection.abort()
        self.cold_connections.clear()

    def stop_ingress(self) -> None:
        """Close the ingress's socket."""
        if self.ingress is not None:
            self.ingress.close()
        self.ingress = None

    def stop_desk(self) -> None:
        """Close the desk's socket."""
        if self.desk is not None:
            self.desk.close()
        self.desk = None

    @property
    def url(self) -> str:
        return f"{'https' if self.site.certificate else 'http'}://127.0.0.1:{self.site.port}"

    # --- the edge's process ---
    async def start(self) -> None:
        """Start HAProxy and wait until it listens."""
        process.check(self.layout)
        with self.layout.usage_log.open("ab") as out, (self.layout.logs / "edge.log").open("ab") as err:
            self.child = subprocess.Popen(self._argv(), stdout=out, stderr=err, stdin=subprocess.DEVNULL)

        async def answers() -> bool:
            try:
                async with self.client("") as client:
                    return (await client.get("/health")).status_code == 200
            except httpx.TransportError:
                return False

        await until(answers, f"the edge answers on {self.url}")

    def _argv(self) -> tuple[str, ...]:
        limit = () if self.open_files is None else ("prlimit", f"--nofile={self.open_files}:{self.open_files}")
        return (*limit, *process.argv(self.layout))

    def kill(self) -> None:
        """``kill -9``."""
        assert self.child is not None
        self.child.kill()
        self.child.wait()

    def usage(self) -> list[dict[str, Any]]:
        """The usage log."""
        return [json.loads(line) for line in self.layout.usage_log.read_text().splitlines()]

    # --- engines ---
    async def start_engine(
        self,
        name: str,
        *options: str,
        slot: int | None = None,
        server: int = 0,
        recording: bool = True,
        module: str = "tests.support.fake_engine",
    ) -> FakeEngine:
        """A fake engine over mutual TLS with the slot's key, not routed yet. ``module``: another program like it."""
        if slot is None:
            slot = self.names.get(name, len(set(self.names.values())))
        if name not in self.names:
            self.names[name] = slot
            await self.runtime.sync_slots(self.names, (slot,))
        record = self.layout.state / f"seen-{len(self.engines)}.jsonl"
        argv = [sys.executable, "-m", module, "--model", name, *options]
        if recording:
            argv += ["--record", str(record)]
        if "--ssl-certfile" not in options:
            argv += engine_tls(self.layout)
        environment = {**os.environ, "VLLM_API_KEY": self.runtime.slot_key(slot)}
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        assert child.stdout is not None
        line = await asyncio.to_thread(child.stdout.readline)
        assert line.startswith("listening "), line
        engine = FakeEngine(child, line.split()[1], slot, server, record)
        self.engines.append(engine)
        return engine

    async def add_engine(self, name: str, *options: str, slot: int | None = None, server: int = 0) -> FakeEngine:
        """A fake engine with its route open."""
        engine = await self.start_engine(name, *options, slot=slot, server=server)
        await self.runtime.open(engine.slot, engine.server, engine.address)
        await until(lambda: self.is_up(engine), "the edge reports the engine up")
        return engine

    async def is_up(self, engine: FakeEngine) -> bool:
        stat = await self.stat(engine)
        return stat is not None and stat.up

    async def stat(self, engine: FakeEngine) -> ServerStat | None:
        """The edge's statistics of an engine; ``None`` in ``maint``."""
        found = await self.runtime.servers((engine.slot,))
        return next((stat for stat in found if stat.server == engine.server), None)

    # --- callers ---
    def client(self, key: str | None = None, **options: Any) -> httpx.AsyncClient:
        """A client of the front door, with the user's key if no other is given (``""``: without one)."""
        given = self.user_key if key is None else key
        headers = {"authorization": f"Bearer {given}"} if given else {}
        trust: ssl.SSLContext | bool = False
        if self.site.certificate:
            trust = gateway_tls(self.layout)
            trust.check_hostname = False  # the certificate at hand is Serve's
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30, verify=trust, **options)

    async def ask(self, model: str, text: str, **more: Any) -> httpx.Response:
        """One chat completion."""
        async with self.client() as client:
            return await client.post("/v1/chat/completions", json=chat(model, text, **more))

    async def raw(self, data: bytes, within_s: float = 5.0) -> tuple[int, str]:
        """Send these bytes and no more; the answer's status (0: none came in time) and all of its text."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.site.port)
        got = b""
        try:
            async with asyncio.timeout(within_s):
                writer.write(data)
                await writer.drain()
                while not _whole(got):
                    piece = await reader.read(65536)
                    if not piece:
                        break
                    got += piece
        except TimeoutError:
            return 0, ""
        except ConnectionError:
            pass  # rejected while the request was still being sent: the answer before that counts
        finally:
            writer.close()
        return int(got.split(b" ", 2)[1]) if got else 0, got.decode("latin-1")

    def socket(self, command: str) -> str:
        """A raw command on the administration socket."""
        return ask(self.layout.edge_socket, command)

    def _ingress(self, exchange: Exchange) -> Coroutine[Any, Any, None] | None:
        """Stands for Serve: reports what it received, and keeps it."""
        self.cold_connections.add(exchange.connection)
        if exchange.request.target == CHECK:
            exchange.send(self.check_status, b"{}")
            return None
        self.cold.append(exchange.request)
        if exchange.request.path == "/ready":
            return self._say_ready(exchange)
        if self.loaded is not None and exchange.request.method == "POST":
            return self._send_back(exchange, self.loaded)
        body = {"cold": True, "bytes": len(exchange.request.body), "path": exchange.request.target}
        if self.cold_hangs:
            return None
        status = self.cold_statuses.pop(0) if self.cold_statuses else 200
        exchange.send(status, json.dumps(body).encode(), headers=self.cold_headers)
        return None

    async def _say_ready(self, exchange: Exchange) -> None:
        await asyncio.sleep(self.ready_takes_s)
        exchange.send(self.ready_status, b'{"cold": true}')

    async def _send_back(self, exchange: Exchange, loaded: asyncio.Event) -> None:
        await loaded.wait()
        door = httpx.AsyncHTTPTransport(uds=str(self.layout.inner_door), verify=False)
        request = exchange.request
        headers = {"x-gateway-model": request.header("x-gateway-model"), "content-type": "application/json"}
        async with httpx.AsyncClient(transport=door, timeout=30) as client:
            answer = await client.post(f"http://inner{request.path}", content=request.body, headers=headers)
        exchange.send(answer.status_code, answer.content)


def _whole(answer: bytes) -> bool:
    """Whether this is a whole answer with a content-length."""
    head, found, body = answer.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), None)
    return bool(found) and length is not None and len(body) >= length


def chat(model: str, text: str, **more: Any) -> dict[str, Any]:
    """A chat request's body."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


def engine_tls(layout: Layout) -> list[str]:
    """An engine's TLS options: its own certificate, and the demand for one of the gateway's."""
    return [
        *("--ssl-keyfile", str(layout.engine_key), "--ssl-certfile", str(layout.engine_certificate)),
        *("--ssl-ca-certs", str(layout.ca), "--ssl-cert-reqs", "2"),
    ]


def gateway_tls(layout: Layout, identity: Path | None = None) -> ssl.SSLContext:
    """A client's context that trusts the gateway's authority, with the certificate in ``identity``."""
    context = ssl.create_default_context(cafile=str(layout.ca))
    if identity is not None:
        context.load_cert_chain(identity)
    return context


def engine_name() -> str:
    """The name to ask an engine's certificate for."""
    return ENGINE_NAME


@asynccontextmanager
async def running_edge(
    limits: Limits | None = None,
    slots: int = 4,
    servers_per_slot: int = 3,
    threads: int = 1,
    tls: bool = False,
    cors_origins: tuple[str, ...] = (),
    open_files: int | None = None,
) -> AsyncIterator[Edge]:
    """An edge with a stand-in ingress, a user's and an admin's key; ends every process it started.

    ``tls``: the front door has a certificate (an engine's, for want of another). ``open_files``: the edge's limit.
    """
    folder = Path(tempfile.mkdtemp(prefix="gwt", dir="/tmp"))  # short: sockets lie in it
    before = os.environ.get("GATEWAY_RUN_ROOT")
    os.environ["GATEWAY_RUN_ROOT"] = str(folder)
    layout = Layout(folder / "state")
    edge: Edge | None = None
    try:
        certificate = folder / "front.pem" if tls else None
        if certificate is not None:
            layout.make()
            make_authority(layout)
            write_private(certificate, layout.engine_certificate.read_bytes() + layout.engine_key.read_bytes())
        site = edge_site(free_port(), limits, certificate, cors_origins)
        process.prepare(
            layout, site, slots=slots, servers_per_slot=servers_per_slot, threads=threads, open_files=open_files
        )
        store = KeyStore(layout)
        edge = Edge(layout, site, store.create("ann", "user"), store.create("root", "admin"), EdgeRuntime(layout))
        edge.open_files = open_files
        write_private(layout.admin_key, edge.admin_key)
        edge.desk = await listen(edge._ingress, "", 0, uds=str(layout.desk_socket))
        await edge.start_ingress()
        await edge.start()
        try:
            yield edge
        finally:
            edge.stop_ingress()
            edge.stop_desk()
    finally:
        for child in [*(engine.child for engine in edge.engines), edge.child] if edge is not None else []:
            if child is not None:
                child.kill()
                child.wait()
                if child.stdout is not None:
                    child.stdout.close()
        if before is None:
            del os.environ["GATEWAY_RUN_ROOT"]
        else:
            os.environ["GATEWAY_RUN_ROOT"] = before
        shutil.rmtree(folder, ignore_errors=True)
