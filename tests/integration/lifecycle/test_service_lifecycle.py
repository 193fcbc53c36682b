"""``gateway up`` and ``down`` as a user runs them: twice, with something else, after a crash, failing, interrupted."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import httpx
import psutil
import pytest
import yaml

from gateway_plugin.processes import arguments
from tests.integration.lifecycle.conftest import models
from tests.support.gateways import ROOT, Gateway, fake_model, gateway, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def parts(made: Gateway) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(made.layout.supervisor_status.read_text())
    return {"supervisor": found["supervisor"], **found["parts"]}


def answers(made: Gateway) -> bool:
    try:
        return made.chat("alpha").status_code == 200
    except httpx.HTTPError:
        return False


def status(made: Gateway) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(made.cli("status", "--json", check=False).stdout)
    return found


def test_a_second_up_says_that_it_is_up(running: Gateway) -> None:
    before = parts(running)
    done = running.cli("up", "--site", str(running.site), "--models", str(running.catalog))
    assert "already up" in done.stdout
    assert running.url in done.stdout
    assert {name: part["pid"] for name, part in parts(running).items()} == {
        name: part["pid"] for name, part in before.items()
    }


def test_up_without_options_takes_those_of_before(running: Gateway) -> None:
    assert json.loads(running.cli("up", "--json").stdout)["outcome"] == "already up"


def test_up_with_another_catalog_or_port_says_what_to_do(running: Gateway) -> None:
    other = running.folder / "other.yaml"
    other.write_text(yaml.safe_dump({"models": {"gamma": fake_model(running.folder / "memory")}}))
    done = running.cli("up", "--site", str(running.site), "--models", str(other), check=False)
    assert done.returncode == 69
    assert f"gateway models apply {other}" in done.stderr
    catalog = str(running.catalog)
    done = running.cli("up", "--site", str(running.site), "--models", catalog, "--port", "39999", check=False)
    assert done.returncode == 69
    assert "gateway down" in done.stderr


def test_commands_work_on_a_running_gateway(running: Gateway) -> None:
    assert "ready after" in running.cli("models", "load", "alpha", "--wait").stdout
    assert "alpha pid=" in running.cli("chat", "alpha", "hello").stdout
    listed = json.loads(running.cli("models", "list", "--json").stdout)
    assert {model["name"]: model["state"] for model in listed}["alpha"] == "ready"
    assert running.cli("models", "show", "nobody", check=False).returncode == 66
    assert len(json.loads(running.cli("blocks", "list", "--json").stdout)) == 1
    found = status(running)
    assert (found["state"], found["gateway"]["engines"][0]["model"]) == ("ready", "alpha")
    assert {part["state"] for part in found["parts"].values()} == {"running"}
    names = {log["name"] for log in json.loads(running.cli("logs", "--json").stdout)}
    assert {"supervisor", "edge", "usage", "ray", "deploy", "controller", "ingress"} <= names
    assert running.cli("doctor").returncode == 0
    replayed = running.cli("controller", "replay", str(running.layout.controller_files.events), "--json").stdout
    effects = [effect["effect"] for line in replayed.splitlines() for effect in json.loads(line)["effects"]]
    assert "StartEngine" in effects
    secret = json.loads(running.cli("keys", "create", "ann", "--json").stdout)["secret"]
    listing = httpx.get(f"{running.url}/v1/models", headers={"x-api-key": secret}, verify=running.trust)
    assert listing.status_code == 200
    running.cli("keys", "revoke", "ann")
    assert httpx.get(f"{running.url}/v1/models", headers={"x-api-key": secret}, verify=running.trust).status_code == 401


def test_a_remote_user_reaches_it_through_a_tunnel_as_the_docs_say(running: Gateway) -> None:
    """What ``ssh -L PORT:127.0.0.1:8180 GATEWAY-HOST`` does: a port elsewhere that leads to the host's own loopback."""
    secret = json.loads(running.cli("keys", "create", "far", "--json").stdout)["secret"]
    certificates = running.folder / "gateway-ca.pem"
    certificates.write_text(running.cli("ca").stdout)
    with socket.create_server(("127.0.0.1", 0)) as tunnel:
        port = tunnel.getsockname()[1]
        ended = threading.Event()
        carrier = threading.Thread(target=carry, args=(tunnel, httpx.URL(running.url).port, ended))
        carrier.start()
        environment = {
            **running.environment, "GATEWAY_STATE": str(running.folder / "nobodys"), "GATEWAY_API_KEY": secret,
            "GATEWAY_URL": f"https://127.0.0.1:{port}", "GATEWAY_CA": str(certificates),
        }  # fmt: skip
        argv = [sys.executable, "-m", "gateway_plugin.cli.main"]
        told = {
            command: subprocess.run(
                [*argv, *command.split()], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
            )
            for command in ("status", "models list --json", "keys list")
        }
        ended.set()
        carrier.join()
    running.cli("keys", "revoke", "far")
    assert told["status"].returncode == 0, told["status"].stderr
    assert f"gateway: ready at https://127.0.0.1:{port}" in told["status"].stdout
    assert {model["name"] for model in json.loads(told["models list --json"].stdout)} == {
        "alpha",
        "beta",
        "warm",
        "slow",
    }
    assert told["keys list"].returncode == 2
    assert "on that gateway's own machine" in told["keys list"].stderr


def carry(tunnel: socket.socket, port: int | None, ended: threading.Event) -> None:
    """Carry bytes both ways between the tunnel's end and ``port`` of loopback, for any number of connections."""
    tunnel.settimeout(0.1)
    threads: list[threading.Thread] = []
    while not ended.is_set():
        try:
            here, _ = tunnel.accept()
        except TimeoutError:
            continue
        there = socket.create_connection(("127.0.0.1", port or 0))
        here.settimeout(None)
        threads += [threading.Thread(target=pour, args=pair, daemon=True) for pair in ((here, there), (there, here))]
        for thread in threads[-2:]:
            thread.start()


def pour(source: socket.socket, sink: socket.socket) -> None:
    try:
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        source.close()


def test_files_with_secrets_are_nobody_elses(running: Gateway) -> None:
    assert answers(running)
    assert running.layout.state.stat().st_mode & 0o777 == 0o700
    assert running.layout.run.stat().st_mode & 0o777 == 0o700
    for path in (running.layout.usage_log, running.layout.admin_key, running.layout.ray_token):
        assert path.stat().st_mode & 0o777 == 0o600, path
    secrets = [running.key, running.layout.ray_token.read_text().strip()]
    seen = 0
    for process in running.processes():
        with suppress(psutil.NoSuchProcess):  # it ended meanwhile
            assert not any(secret in " ".join(process.cmdline()) for secret in secrets), process
            assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0), f"{process} may leave a core file"
            seen += 1
    assert seen > 5


def test_a_killed_edge_is_back_in_seconds_with_its_routes(running: Gateway) -> None:
    assert answers(running)
    engines, before = running.engine_pids(), parts(running)["edge"]
    os.kill(before["pid"], signal.SIGKILL)
    wait_for(lambda: answers(running), 3, "the edge is back")
    assert running.engine_pids() == engines
    after = wait_for(lambda: parts(running)["edge"]["phase"] == "running" and parts(running)["edge"], 10, "noted")
    assert after["restarts"] == before["restarts"] + 1
    assert after["pid"] != before["pid"]


def test_after_a_killed_supervisor_all_goes_on_and_up_takes_it_over(running: Gateway) -> None:
    assert answers(running)
    engines, before = running.engine_pids(), parts(running)
    os.kill(before["supervisor"]["pid"], signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(before["supervisor"]["pid"]), 10, "the supervisor is gone")
    assert answers(running)
    found = status(running)
    assert (found["state"], found["parts"]["supervisor"]["state"]) == ("degraded", "dead")
    assert found["parts"]["edge"]["state"] == found["parts"]["head"]["state"] == "running"

    assert json.loads(running.cli("up", "--json").stdout)["outcome"] == "adopted"

    after = parts(running)
    assert after["edge"]["pid"] == before["edge"]["pid"]
    assert after["head"]["pid"] == before["head"]["pid"]
    assert after["supervisor"]["pid"] != before["supervisor"]["pid"]
    assert running.engine_pids() == engines
    wait_for(lambda: status(running)["state"] == "ready", 30, "all is well again")


@pytest.mark.parametrize("notes", ["gone", "stale"])
def test_up_takes_over_what_lives_without_the_supervisors_notes(running: Gateway, notes: str) -> None:
    assert answers(running)
    engines, before = running.engine_pids(), parts(running)
    os.kill(before["supervisor"]["pid"], signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(before["supervisor"]["pid"]), 10, "the supervisor is gone")
    if notes == "gone":
        running.layout.supervisor_status.unlink()
    else:
        written = json.loads(running.layout.supervisor_status.read_text())
        for part in written["parts"].values():
            part.update(pid=1, started=1.0)
        running.layout.supervisor_status.write_text(json.dumps(written))
    found = status(running)["parts"]
    assert {name: (found[name]["state"], found[name]["pid"]) for name in ("edge", "head")} == {
        name: ("running", before[name]["pid"]) for name in ("edge", "head")
    }

    assert json.loads(running.cli("up", "--json").stdout)["outcome"] == "adopted"

    after = parts(running)
    assert after["head"]["pid"] == before["head"]["pid"]
    edges = [
        process.pid for process in running.processes() if str(running.layout.edge_config) in arguments(process.pid)
    ]
    assert edges == [after["edge"]["pid"]] == [before["edge"]["pid"]]
    assert running.engine_pids() == engines
    wait_for(lambda: status(running)["state"] == "ready", 30, "all is well again")


def test_an_adopted_edge_and_head_are_kept_alive_too(running: Gateway) -> None:
    assert answers(running)
    engines, before = running.engine_pids(), parts(running)
    os.kill(before["edge"]["pid"], signal.SIGKILL)
    wait_for(lambda: answers(running), 10, "the edge is back")
    head = psutil.Process(before["head"]["pid"])
    raylet = next(child for child in head.children() if child.name() == "raylet")
    raylet.send_signal(signal.SIGTERM)  # 'ray start --block' takes that for an orderly end and stays
    wait_for(lambda: parts(running)["head"]["restarts"] > before["head"]["restarts"], 30, "the head's end is seen")
    assert answers(running)
    wait_for(lambda: status(running)["state"] == "ready", 90, "the head is back")
    assert running.engine_pids() == engines


def test_a_port_in_use_is_named_and_nothing_is_started() -> None:
    with gateway(models, start=False) as made, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = ("up", "--site", str(made.site), "--models", str(made.catalog), "--port", str(port))
        done = made.cli(*arguments, check=False)
        assert done.returncode == 69
        assert f"port {port}" in done.stderr
        assert f"pid {os.getpid()}" in done.stderr
        assert made.processes() == []
        assert not made.layout.run.exists()


def test_an_edge_that_does_not_start_is_told_with_its_log_and_nothing_is_left() -> None:
    with gateway(models, start=False) as made:
        fake = made.folder / "haproxy"
        fake.write_text("#!/bin/sh\n[ $1 = -c ] && exit 0\necho the disk is on fire >&2\nexit 3\n")
        fake.chmod(0o700)
        made.environment["GATEWAY_HAPROXY"] = str(fake)
        done = made.cli("up", "--site", str(made.site), "--models", str(made.catalog), check=False)
        assert done.returncode == 69
        assert "edge: exit code 3" in done.stderr
        assert "the disk is on fire" in done.stderr
        assert str(made.layout.logs) in done.stderr
        assert made.processes() == []
        assert not made.layout.run.exists()


@pytest.mark.parametrize("moment", ["before the supervisor", "edge", "head", "serve"])
def test_ctrl_c_in_the_middle_of_up_leaves_nothing_and_says_where_the_logs_are(moment: str) -> None:
    with gateway(models, start=False) as made:

        def begun() -> bool:
            if moment == "before the supervisor":
                return made.layout.service_lock.exists()
            try:
                return bool(parts(made)[moment]["phase"] == "starting")
            except FileNotFoundError:
                return False

        argv = [sys.executable, "-m", "gateway_plugin.cli.main", "--state", str(made.layout.state), "up"]
        argv += ["--site", str(made.site), "--models", str(made.catalog)]
        with subprocess.Popen(argv, env=made.environment, cwd=ROOT, stderr=subprocess.PIPE, text=True) as child:
            wait_for(begun, 60, f"{moment} starts")
            child.send_signal(signal.SIGINT)
            time.sleep(0.3)
            child.send_signal(signal.SIGINT)  # people press it twice; cleaning up is not to be interrupted
            _, words = child.communicate(timeout=60)
        assert child.returncode == 130, words
        assert str(made.layout.logs) in words
        assert made.processes() == []
        assert not made.layout.run.exists()
