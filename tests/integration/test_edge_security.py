"""What stands between the gateway and strangers on the same machine and network: certificates, sockets, names, keys."""

from __future__ import annotations

import asyncio
import os
import ssl
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from gateway_plugin.edge.keys import KeyStore
from gateway_plugin.errors import EdgeError, InvalidRequest, NotFound
from gateway_plugin.paths import Layout
from gateway_plugin.tls import make_authority
from tests.support.edges import Edge, chat, gateway_tls, running_edge, until
from tests.support.ports import free_port
from tests.support.raw_http import Exchange, listen, tls_context

pytestmark = pytest.mark.integration

NOBODY = 65534


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge() as running:
        yield running


async def test_no_name_becomes_a_command(edge: Edge) -> None:
    await edge.add_engine("tiny")
    before = edge.socket("show servers state")
    for name in (
        "x;set server slot0/e0 state maint",
        "x slot0",
        "x\nset server slot0/e0 state maint",
        "",
        "5",
        "x" * 129,
    ):
        with pytest.raises(EdgeError):
            await edge.runtime.sync_slots({"tiny": 0, name: 1}, ())
    for address in (
        "127.0.0.1:80;disable server slot0/e0",
        "127.0.0.1 port 1;x:80",
        "localhost:80",
        "127.0.0.1:0",
        "x",
    ):
        with pytest.raises(EdgeError):
            await edge.runtime.open(1, 0, address)
    for slot, server in ((99, 0), (0, 99), (-1, 0)):
        with pytest.raises(EdgeError):
            await edge.runtime.open(slot, server, "127.0.0.1:80")
        with pytest.raises(EdgeError):
            await edge.runtime.drain(slot, server)
    for bad in ("ann;disable server slot0/e0", "a b", "a:b", "", "-x", 'a"b'):
        with pytest.raises(InvalidRequest):
            KeyStore(edge.layout).create(bad, "user")
    assert await edge.runtime.tenants() == {"tiny": 0}
    assert edge.socket("show servers state").splitlines()[2].split()[:7] == before.splitlines()[2].split()[:7]
    assert (await edge.ask("tiny", "hello")).json()["model"] == "tiny"


async def test_an_engine_refuses_who_has_no_certificate(edge: Edge) -> None:
    engine = await edge.add_engine("tiny")
    layout = edge.layout
    key = {"authorization": f"Bearer {edge.runtime.slot_key(0)}"}
    url = f"https://{engine.address}"
    named = {"sni_hostname": "engine.gateway"}

    async def call(context: ssl.SSLContext, path: str) -> int:
        async with httpx.AsyncClient(verify=context) as client:
            answer = await client.post(url + path, json=chat("tiny", "x"), headers=key, extensions=named)
            return answer.status_code

    assert await call(gateway_tls(layout, layout.edge_identity), "/v1/chat/completions") == 200
    assert await call(gateway_tls(layout, layout.agent_identity), "/v1/chat/completions") == 200
    stranger = Layout(layout.state.parent / "other")
    stranger.state.mkdir(mode=0o700)
    make_authority(stranger)
    foreign = gateway_tls(layout)
    foreign.load_cert_chain(stranger.edge_identity)
    engines_own = gateway_tls(layout)
    engines_own.load_cert_chain(layout.engine_certificate, layout.engine_key)  # good for serving only
    for context in (gateway_tls(layout), foreign, engines_own):
        for path in ("/health", "/v1/chat/completions", "/sleep"):
            with pytest.raises(httpx.TransportError):
                await call(context, path)
    with pytest.raises(httpx.TransportError):
        async with httpx.AsyncClient() as client:
            await client.get(f"http://{engine.address}/health")
    assert [seen["path"] for seen in engine.seen()] == ["/v1/chat/completions"] * 2


async def test_an_impostor_on_an_engines_port_gets_nothing(edge: Edge) -> None:
    """Somebody binds the port that an engine left: without the authority's certificate the edge tells it nothing."""
    stranger = Layout(edge.layout.state.parent / "other")
    stranger.state.mkdir(mode=0o700)
    make_authority(stranger)
    front = edge.layout.front_identity  # of the right authority, with another name
    make_authority(edge.layout, front_hosts=("localhost",))
    for tls in (
        ["--ssl-keyfile", str(stranger.engine_key), "--ssl-certfile", str(stranger.engine_certificate)],
        ["--ssl-keyfile", str(front), "--ssl-certfile", str(front)],
    ):
        impostor = await edge.start_engine("tiny", *tls)
        await edge.runtime.open(0, 0, impostor.address)
        assert (await edge.ask("tiny", "my prompt")).json()["cold"] is True
        assert impostor.seen() == []
        impostor.kill()


async def test_without_a_desk_its_paths_are_answered_in_json_and_the_rest_goes_on(edge: Edge) -> None:
    edge.stop_desk()
    async with edge.client() as client:
        answer = await client.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert (await edge.ask("tiny", "hello")).json()["cold"] is True


async def test_what_an_engine_says_to_the_gateway_is_not_heard(edge: Edge) -> None:
    layout = edge.layout
    control = (("x-gateway-not-routed", "1"), ("X-Gateway-Request", "mine"), ("x-gateway-stamp", "1"))

    def answer(exchange: Exchange) -> None:
        exchange.send(200, b"{}", headers=(*control, ("x-other", "kept")))

    tls = tls_context(str(layout.engine_key), str(layout.engine_certificate), str(layout.ca), 2)
    port = free_port()
    server = await listen(answer, "127.0.0.1", port, tls=tls)
    await edge.runtime.sync_slots({"tiny": 0}, (0,))
    await edge.runtime.open(0, 0, f"127.0.0.1:{port}")
    warm = await edge.ask("tiny", "hello")
    transport = httpx.AsyncHTTPTransport(uds=str(layout.inner_door))
    async with httpx.AsyncClient(transport=transport, base_url="http://inner") as ingress:
        named = {"x-gateway-model": "tiny"}
        inner = await ingress.post("/v1/chat/completions", json=chat("tiny", "hello"), headers=named)
        await edge.runtime.close(0, 0)
        edge.cold_headers = (("x-gateway-not-routed", "1"),)
        back = await ingress.post("/v1/chat/completions", json=chat("tiny", "hello"), headers=named)
    server.close()
    assert warm.headers["x-other"] == inner.headers["x-other"] == "kept"
    assert "x-gateway-not-routed" not in warm.headers
    assert len(warm.headers.get_list("x-gateway-request")) == 1
    assert warm.headers["x-gateway-request"] != "mine"
    assert not [name for name in inner.headers if name.startswith("x-gateway-")]
    assert back.json()["cold"] is True
    assert back.headers["x-gateway-not-routed"] == "1", "the ingress's own word goes through"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
async def test_another_user_of_the_machine(edge: Edge) -> None:
    """Sockets and files: not to be opened; neither with the folder's protection alone nor with the socket's own."""
    layout = edge.layout
    sockets = (layout.edge_socket, layout.inner_door, layout.cold_door, layout.around_door)
    maps = (layout.edge_config, layout.keys_map, layout.slot_keys_map, layout.keys_json, layout.edge_secret)
    keys = (layout.ca_key, layout.engine_key, layout.edge_identity, layout.agent_identity)
    secrets = (*maps, *keys)
    for path in (*sockets, *secrets):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for folder in (layout.run, layout.state, layout.tls, layout.node, layout.edge):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    assert all(_as_nobody(path) == "PermissionError" for path in (*sockets, *secrets))
    for folder in {layout.run.parent, layout.run, layout.state, layout.tls, layout.node, layout.edge}:
        folder.chmod(0o755)
    assert all(_as_nobody(path) == "PermissionError" for path in (*sockets, *secrets))


def _as_nobody(path: Path) -> str:
    program = (
        "import socket, sys\n"
        "try:\n"
        "    if sys.argv[1].endswith('.sock'):\n"
        "        socket.socket(socket.AF_UNIX).connect(sys.argv[1])\n"
        "    else:\n"
        "        open(sys.argv[1]).read()\n"
        "    print('opened')\n"
        "except OSError as error:\n"
        "    print(type(error).__name__)\n"
    )
    done = subprocess.run(
        ("/usr/bin/python3", "-c", program, str(path)),
        capture_output=True, text=True, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", check=False,
    )  # fmt: skip
    return done.stdout.strip() or done.stderr


async def test_no_secret_in_a_command_line(edge: Edge) -> None:
    engine = await edge.add_engine("tiny")
    assert edge.child is not None
    said = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (edge.child.pid, engine.child.pid))
    for secret in (edge.layout.edge_secret.read_text(), edge.runtime.slot_key(0), edge.user_key):
        assert secret.encode() not in said
    assert sys.executable.encode() in said


async def test_keys_work_at_once_and_no_longer(edge: Edge) -> None:
    store = KeyStore(edge.layout)
    await edge.add_engine("tiny")

    async def status(key: str) -> int:
        async with edge.client(key) as client:
            return (await client.get("/v1/models")).status_code

    fresh = store.create("new", "user")
    assert await status(fresh) == 200
    store.revoke("new")
    assert await status(fresh) == 401
    with pytest.raises(NotFound):
        store.revoke("new")
    again = store.create("new", "admin")
    assert await status(fresh) == 401
    assert await status(again) == 200
    on_disk = edge.layout.keys_json.read_text() + edge.layout.keys_map.read_text()
    assert again not in on_disk
    edge.kill()
    away = store.create("made-while-away", "user")
    store.revoke("new")
    await edge.start()
    assert await status(away) == 200
    assert await status(again) == 401


async def test_a_slow_caller_without_a_key_holds_nothing_up(edge: Edge) -> None:
    """Fifty callers that announce bodies and send none; others are served meanwhile."""
    await edge.add_engine("tiny")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: e\r\ncontent-length: 100000\r\n\r\n"
    idle = [await asyncio.open_connection("127.0.0.1", edge.site.port) for _ in range(50)]
    for _, writer in idle:
        writer.write(head)
    assert (await edge.ask("tiny", "hello")).json()["model"] == "tiny"

    async def all_refused() -> bool:
        return len(edge.cold) == 0 and all(reader._buffer for reader, _ in idle)  # type: ignore[attr-defined]

    await until(all_refused, "all fifty have their answer")
    for _, writer in idle:
        writer.close()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_a_front_door_with_a_certificate_speaks_tls_only() -> None:
    async with running_edge(tls=True) as edge:
        await edge.add_engine("tiny")
        assert edge.url.startswith("https://")
        assert (await edge.ask("tiny", "hello")).json()["model"] == "tiny"
        assert (await edge.ask("unknown", "hello")).json()["cold"] is True
        async with edge.client() as client:
            assert (await client.get("/v1/models")).status_code == 200
        with pytest.raises(httpx.TransportError):
            async with httpx.AsyncClient() as plain:
                await plain.get(edge.url.replace("https", "http") + "/health")
        old = gateway_tls(edge.layout)
        old.check_hostname = False
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.minimum_version = ssl.TLSVersion.TLSv1
        with pytest.raises(httpx.TransportError):
            async with httpx.AsyncClient(verify=old) as client:
                await client.get(f"{edge.url}/health")
