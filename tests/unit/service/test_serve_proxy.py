"""Ray's own server of Serve's proxy, as it is installed, with our function in it: who gets an answer."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway_plugin.paths import Layout
from gateway_plugin.service import ray_head
from gateway_plugin.service.serve_proxy import CALLBACK, answers_strangers
from gateway_plugin.tls import SERVE_NAME, make_authority
from tests.support.edges import edge_site
from tests.support.ports import free_port

pytestmark = pytest.mark.process

_PROXY = """
import asyncio, sys
from ray.serve._private.http_util import configure_http_middlewares, start_asgi_http_server
from ray.serve.config import HTTPOptions
port, key, certificate, ca = sys.argv[1:]
options = HTTPOptions(host="127.0.0.1", port=int(port), ssl_keyfile=key, ssl_certfile=certificate, ssl_ca_certs=ca)
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"served"})
async def main():
    loop = asyncio.get_running_loop()
    task, server = await start_asgi_http_server(app, configure_http_middlewares(options), event_loop=loop)
    while not server.started:
        await asyncio.sleep(0.01)
    print("started", flush=True)
    await task
asyncio.run(main())
"""


@contextmanager
def proxy(layout: Layout, environment: dict[str, str]) -> Iterator[int]:
    """Ray's server on a port of its own."""
    port = free_port()
    argv = (str(port), str(layout.serve_key), str(layout.serve_certificate), str(layout.ca))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        (sys.executable, "-c", _PROXY, *argv), env={**inherited, **environment}, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            assert "started" in child.stdout.read(8), "the server did not start"
            yield port
        finally:
            child.kill()


def ask(port: int, layout: Layout, identity: Path | None = None, key: Path | None = None) -> bytes:
    """The answer to a caller with this certificate; empty if there is none."""
    context = ssl.create_default_context(cafile=str(layout.ca))
    if identity is not None:
        context.load_cert_chain(identity, key)
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as plain:
            with context.wrap_socket(plain, server_hostname=SERVE_NAME) as link:
                link.sendall(b"GET /-/routes HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                return b"".join(iter(lambda: link.recv(4096), b""))
    except (ssl.SSLError, ConnectionError):
        return b""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "state")
    made.state.mkdir(mode=0o700)
    make_authority(made)
    return made


def test_serves_proxy_answers_only_who_has_a_certificate_of_the_gateway(layout: Layout, tmp_path: Path) -> None:
    """Fails when Ray no longer calls the function, or no longer makes its server with ``uvicorn.Config``."""
    environment = ray_head.head_env(layout, edge_site(8180, 8181), {})
    stranger = Layout(tmp_path / "other")
    stranger.state.mkdir(mode=0o700)
    make_authority(stranger)
    with proxy(layout, {CALLBACK: environment[CALLBACK]}) as port:
        assert b"served" in ask(port, layout, layout.edge_identity)
        assert ask(port, layout) == b""
        assert ask(port, layout, stranger.edge_identity) == b""
        assert ask(port, layout, layout.engine_certificate, layout.engine_key) == b"", "good for serving only"
        assert not answers_strangers(port)


def test_a_proxy_that_asks_for_no_certificate_is_noticed(layout: Layout) -> None:
    with proxy(layout, {}) as port:
        assert answers_strangers(port)
    assert not answers_strangers(port), "nobody there"
