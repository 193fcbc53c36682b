from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from pathlib import Path
from uuid import uuid4

import pytest
import yaml

from gateway_plugin.engine_records import engine_folder
from gateway_plugin.errors import ConfigError, ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.service import ray_head
from gateway_plugin.site import NodeType, Site
from serve.agent.records import record_path
from tests.support.queue import QueueProvider, Scheduler


def site(**values: object) -> Site:
    node_type = NodeType(name="a", provider=QueueProvider(Scheduler()), cpus=1, engine_memory_gib=1)
    return Site.model_validate({"name": "here", "node_types": (node_type,), **values})


def test_no_port_but_ours_is_fixed(tmp_path: Path) -> None:
    argv = ray_head.head_argv(Layout(tmp_path), site(ray_port=7001), "10.0.0.1", "/venv/bin/python")
    options = dict(option.split("=", 1) for option in argv if option.startswith("--") and "=" in option)
    assert options["--port"] == "7001"
    assert options["--node-ip-address"] == "10.0.0.1"
    assert options["--num-cpus"] == "0"
    assert {value for name, value in options.items() if name.endswith("-port") and name != "--port"} == {"0"}
    env = ray_head.head_env(Layout(tmp_path), site(), {})
    assert env["AUTOSCALER_METRIC_PORT"] == env["DASHBOARD_METRIC_PORT"] == "-1"


def test_no_secret_is_in_argv_or_environment(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "state")
    layout.make()
    ray_head.prepare(layout, site(), "local", "10.0.0.1")
    token = layout.ray_token.read_text()
    assert len(token) >= 32
    assert layout.ray_token.stat().st_mode & 0o777 == 0o600
    argv, env = ray_head.head_argv(layout, site(), "10.0.0.1", "python"), ray_head.head_env(layout, site(), {})
    everything = json.dumps([argv, env, yaml.safe_load(layout.cluster_yaml.read_text())])
    assert token not in everything
    ray_head.prepare(layout, site(), "local", "10.0.0.1")
    assert layout.ray_token.read_text() == token  # blocks that still run have it


def test_settings_of_another_ray_do_not_leak_in(tmp_path: Path) -> None:
    base = {"RAY_ADDRESS": "10.9.9.9:1", "RAY_AUTH_TOKEN": "x", "RAY_AUTH_MODE": "disabled", "PATH": "/bin"}
    env = ray_head.head_env(Layout(tmp_path), site(queue_wait_max_s=7200), base)
    assert "RAY_ADDRESS" not in env
    assert "RAY_AUTH_TOKEN" not in env
    assert env["RAY_AUTH_MODE"] == "token"
    assert env["PATH"] == "/bin"
    assert env["RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"] == "7200"
    assert env["RAY_CLOUD_INSTANCE_ID"] == "head"
    assert env["RAY_memory_monitor_refresh_ms"] == "0"
    assert "RAY_CLOUD_INSTANCE_ID" not in ray_head.driver_env(Layout(tmp_path), base)


def test_token_and_authority_are_new_with_a_fresh_start_and_kept_where_parts_live_on(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "state")
    layout.make()

    def secrets() -> tuple[bytes, bytes, bytes]:
        return layout.ray_token.read_bytes(), layout.ray_ca.read_bytes(), layout.ray_ca_key.read_bytes()

    ray_head.make_secrets(layout, keep=True)  # nothing is there yet
    first = secrets()
    ray_head.make_secrets(layout, keep=True)
    assert secrets() == first
    ray_head.make_secrets(layout, keep=False)
    assert all(new != old for new, old in zip(secrets(), first, strict=True))


def test_head_and_driver_call_and_serve_with_certificates(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    base = {"RAY_USE_TLS": "0", "RAY_TLS_CA_CERT": "/of/somebody/else"}
    for env in (ray_head.head_env(layout, site(), base), ray_head.driver_env(layout, base)):
        assert env["RAY_USE_TLS"] == "1"
        assert {env[f"RAY_TLS_{name}"] for name in ("SERVER_CERT", "SERVER_KEY", "CA_CERT")} == {
            str(layout.ray_identity / name) for name in ("node.crt", "node.key", "authority.crt")
        }


def test_a_run_folder_too_deep_for_sockets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", "/tmp/" + "x" * 40)
    with pytest.raises(ServiceError, match="GATEWAY_RUN_ROOT"):
        ray_head.head_argv(Layout(tmp_path), site(), "10.0.0.1", "python")


def test_sockets_in_an_engines_folder_fit_wherever_the_heads_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeroMQ's of vLLM (a UUID), and those of multiprocessing."""
    layout, lengths = Layout(Path("/s")), list[int]()
    for length in range(1, 60):
        monkeypatch.setenv("GATEWAY_RUN_ROOT", "/" + "r" * length)
        with contextlib.suppress(ServiceError):
            ray_head.head_argv(layout, site(), "10.0.0.1", "python")
            folder = engine_folder(record_path(layout, f"{'m' * 64}-1-17"))
            lengths += [len(f"{folder}/{name}") for name in (str(uuid4()), "pymp-12345678/listener-12345678")]
    assert 90 < max(lengths) <= 107


def test_the_head_s_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_head.head_address(site(head_address="127.0.0.1")) == "127.0.0.1"
    socket.inet_aton(ray_head.head_address(site()))
    with pytest.raises(ConfigError, match="head_address"):
        ray_head.head_address(site(head_address="no such host.invalid"))

    class NoRoute:
        def __init__(self, *_: object) -> None:
            raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "socket", NoRoute)
    socket.inet_aton(ray_head.head_address(site()))


@pytest.mark.process
def test_leftovers_are_found_by_the_folder_they_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    layout = Layout(tmp_path / "state")
    layout.make()
    layout.ray_temp.mkdir()
    ours = subprocess.Popen(
        ["sh", "-c", f"exec 3>{layout.ray_temp}/log; sleep 300 & echo; wait"], stdout=subprocess.PIPE
    )
    others = subprocess.Popen(["tail", "-f", f"{layout.ray_temp}er", "/dev/null"], stderr=subprocess.DEVNULL)
    try:
        assert ours.stdout is not None
        ours.stdout.readline()
        found = {process.pid for process in ray_head.leftover_processes(layout)}
        assert ours.pid in found
        assert others.pid not in found
        assert ray_head.end_leftovers(layout) == ()
        ours.wait(5)
        assert others.poll() is None
    finally:
        for process in (ours, others):
            if process.poll() is None:
                process.kill()
            process.communicate()


def test_the_site_may_name_the_interface_that_blocks_reach() -> None:
    assert ray_head.head_address(site(head_interface="lo")) == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"head_interface: 'hsn9'.* lo"):
        ray_head.head_address(site(head_interface="hsn9"))
