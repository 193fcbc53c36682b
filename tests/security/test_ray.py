"""What strangers get of Ray: at a port that they took first, and at those that Ray listens on."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest

from gateway_plugin.blocks.ray_tls import make_identity, tls_environment
from gateway_plugin.paths import Layout, block_folder
from gateway_plugin.processes import block_processes
from gateway_plugin.service import ray_head
from gateway_plugin.tls import make_ray_authority, sign_for_ray
from tests.integration.test_blocks_head import AGENT, ASK
from tests.support.clusters import LocalCluster, local_cluster, opened, wait_for
from tests.support.doors import CLOSED, MUTUAL_TLS, PLAIN_HTTP, door_at, doors_of
from tests.support.http2_stub import Stub, is_http2, stub_on
from tests.support.ports import free_port

pytestmark = pytest.mark.integration

CALLS = {
    "gcs_server": "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "raylet": "/ray.rpc.NodeManagerService/GetNodeStats",
    "ray::Agent": "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
}
"""A call that each of these processes answers."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A head, and a block with an agent in it."""
    with local_cluster() as made:
        made.drive(AGENT)
        yield made


def token_of(cluster: LocalCluster) -> bytes:
    return cluster.layout.ray_token.read_bytes().strip()


def stranger(folder: Path, address: str) -> ssl.SSLContext:
    """A server with a certificate for the right address, of an authority that is not ours. Asks for no certificate."""
    layout = Layout(folder)
    folder.mkdir()
    make_ray_authority(layout, keep=False)
    certificate, key = folder / "node.crt", folder / "node.key"
    sign_for_ray(layout, address, certificate, key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    return context


def credentials(cluster: LocalCluster, *, own: bool) -> grpc.ChannelCredentials:
    identity = cluster.layout.ray_identity
    pair = ((identity / "node.key").read_bytes(), (identity / "node.crt").read_bytes()) if own else (None, None)
    return grpc.ssl_channel_credentials((identity / "authority.crt").read_bytes(), *pair)


def call(
    target: str, method: str, how: grpc.ChannelCredentials | None, token: bytes | None, timeout_s: float = 10
) -> grpc.StatusCode:
    """The answer's code to an empty request."""
    channel = grpc.insecure_channel(target) if how is None else grpc.secure_channel(target, how)
    metadata = [] if token is None else [("authorization", f"Bearer {token.decode()}")]
    with channel:
        try:
            channel.unary_unary(method)(b"", metadata=metadata, timeout=timeout_s)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


@pytest.mark.parametrize("tls", [False, True])
def test_a_squatter_reads_what_a_client_sends_that_trusts_it(tls: bool, tmp_path: Path) -> None:
    # that the others of these tests can fail
    folder = tmp_path / "stranger"
    context = stranger(folder, "127.0.0.1") if tls else None
    how = grpc.ssl_channel_credentials(Layout(folder).ray_ca.read_bytes()) if tls else None
    with stub_on(port := free_port(), context) as caught:
        call(f"127.0.0.1:{port}", CALLS["gcs_server"], how, b"sesame", timeout_s=4)
    assert any(is_http2(data) for data in caught.read)
    assert b"Bearer sesame" in caught.everything()
    assert (caught.trusted, caught.spoken_to_in_tls) == ((1, 1) if tls else (0, 0))


def test_ray_sends_its_token_to_the_address_in_the_certificate_alone(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "state")
    make_ray_authority(layout, keep=False)
    environment = tls_environment(tmp_path / "identity")
    make_identity(layout, "127.0.0.1", environment)
    token = tmp_path / "token"
    token.write_text("a" * 64)
    environment = {**os.environ, **environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    for node, seen in (("127.0.0.1", True), ("10.9.9.9", False)):
        certificate, key = tmp_path / "node.crt", tmp_path / "node.key"
        sign_for_ray(layout, node, certificate, key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        context.set_alpn_protocols(["h2"])
        host = "127.0.0.1" if seen else "127.0.0.2"  # every certificate is good for 127.0.0.1
        with stub_on(port := free_port(), context) as caught:
            program = f"from ray._raylet import GcsClient; GcsClient(address='{host}:{port}')"
            client = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL)
            try:
                wait_for(partial(_called, caught, 1 if seen else 3), "calls of the client")
                wait_for(lambda: not seen or b"a" * 64 in caught.everything(), "the token")  # noqa: B023
            finally:
                client.kill()
                client.wait()
        assert (b"a" * 64 in caught.everything()) is seen


def test_whoever_has_the_port_before_the_head_sees_no_token(cluster: LocalCluster, tmp_path: Path) -> None:
    for tls in (None, stranger(tmp_path / "stranger", cluster.head_ip)):
        layout = Layout(tmp_path / ("plain" if tls is None else "tls"))
        site = cluster.site.model_copy(update={"ray_port": free_port()})
        layout.make()
        ray_head.prepare(layout, site, cluster.site_reference, cluster.head_ip)
        with stub_on(site.ray_port, tls) as caught:
            head = subprocess.Popen(
                ray_head.head_argv(layout, site, cluster.head_ip, sys.executable),
                env=ray_head.head_env(layout, site, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                wait_for(partial(_called, caught, 4), "calls of the head")
            finally:
                head.kill()
                head.wait()
                assert ray_head.end_leftovers(layout) == ()
        ray_head.forget(layout)
        shutil.rmtree(layout.run)
        assert caught.spoken_to_in_tls == len([data for data in caught.raw if data]) > 0
        assert layout.ray_token.read_bytes() not in caught.everything()
        assert caught.trusted == 0


def test_whoever_takes_the_port_while_the_head_is_away_sees_no_token(cluster: LocalCluster, tmp_path: Path) -> None:
    before = json.loads(cluster.drive(ASK))
    cluster.kill_head()
    driver = cluster.driver("raise AssertionError('joined')")
    try:
        for tls in (None, stranger(tmp_path / "stranger", cluster.head_ip)):
            with stub_on(cluster.site.ray_port, tls) as caught:
                wait_for(partial(_called, caught, 4), "calls of block and driver", 60)
            assert caught.spoken_to_in_tls == len([data for data in caught.raw if data])
            assert caught.trusted == 0
            assert token_of(cluster) not in caught.everything()
    finally:
        driver.kill()
        assert "joined" not in driver.communicate()[1]
    cluster.restart_head()
    after = json.loads(cluster.drive(ASK))
    assert (after["pid"], after["asked"]) == (before["pid"], before["asked"] + 1)


def _called(caught: Stub, times: int) -> bool:
    return caught.spoken_to_in_tls >= times


def listeners(cluster: LocalCluster) -> list[tuple[str, str, int]]:
    """Process, address and port of everything of the head's and the block's that listens."""
    (block,) = cluster.blocks()
    blocks = opened(block_processes(block.name, block_folder(cluster.layout.run, block.name)))
    return doors_of([*cluster.head_processes(), *blocks])


def test_nothing_that_listens_answers_without_certificate_or_token(cluster: LocalCluster) -> None:
    found: dict[str, set[str]] = {}
    for process, bound, port in listeners(cluster):
        door = door_at(bound, port, cluster.head_ip, cluster.layout.ray_identity)
        if door == CLOSED:  # a worker of Ray's that ended meanwhile
            continue
        found.setdefault(door, set()).add(process.strip())
        if door == PLAIN_HTTP:
            assert bound in (cluster.head_ip, "127.0.0.1")
    assert set(found) == {MUTUAL_TLS, PLAIN_HTTP}, found
    assert {process.split("Agent")[0] for process in found[PLAIN_HTTP]} == {"ray::Dashboard", "ray::RuntimeEnv"}
    assert any("/gcs_server " in process for process in found[MUTUAL_TLS])
    assert sum("/raylet " in process for process in found[MUTUAL_TLS]) == 2
    assert any(process.startswith("ray::Agent") for process in found[MUTUAL_TLS])


def test_a_call_needs_the_token_and_a_certificate(cluster: LocalCluster) -> None:
    own, none = credentials(cluster, own=True), credentials(cluster, own=False)
    token = token_of(cluster)
    called = set()
    for process, _, port in listeners(cluster):
        for program, method in CALLS.items():
            if not (process.startswith(program) or f"/{program} " in f"{process} "):
                continue
            target = f"{cluster.head_ip}:{port}"
            if call(target, method, own, token) is grpc.StatusCode.UNIMPLEMENTED:
                continue  # the raylet's other port, of its object manager
            called.add(program)
            assert call(target, method, own, None) is grpc.StatusCode.UNAUTHENTICATED
            assert call(target, method, own, b"0" * 64) is grpc.StatusCode.UNAUTHENTICATED
            assert call(target, method, none, token) is grpc.StatusCode.UNAVAILABLE
            assert call(target, method, None, token) is grpc.StatusCode.UNAVAILABLE
            assert call(target, method, own, token) is not grpc.StatusCode.UNAUTHENTICATED
    assert called == set(CALLS)
