"""A second user on the gateway's machine tries everything that a login node lets one try: files, names, ``/proc``,
sockets, every port that a part of the gateway listens on, and every port that a part leaves for a moment.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from gateway_plugin.processes import descendants
from gateway_plugin.service.discovery import heads_of
from tests.security.conftest import CATALOG_SECRET
from tests.support.doors import doors_of
from tests.support.gateways import ROOT, Gateway, wait_for
from tests.support.stranger import attempt, needs_root, squatting

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300), needs_root]

PROMPT = "a-prompt-that-is-nobody-elses"


@pytest.fixture(scope="module")
def running(shared: Gateway) -> Gateway:
    shared.up()
    assert shared.chat("alpha", PROMPT).status_code == 200
    return shared


def secrets_of(made: Gateway) -> list[str]:
    """What nobody else may ever read: keys, tokens, private keys, prompts."""
    layout = made.layout
    found = [path.read_text().strip() for path in (layout.admin_key, layout.edge_secret, layout.ray_token)]
    found += [json.loads(path.read_text())["key"] for path in layout.engine_records.glob("*.json")]
    found += [line for path in layout.state.rglob("*.key") for line in path.read_text().splitlines()[1:2]]
    return [*found, PROMPT, CATALOG_SECRET]


def ports_of(made: Gateway) -> dict[int, str]:
    """Every TCP port that a process of the gateway listens on -> the address."""
    return {port: address for _, address, port in doors_of(made.processes())}


def test_no_file_below_the_gateways_folders_can_be_read_or_listed(running: Gateway) -> None:
    folders = [str(path) for top in (running.layout.state, running.layout.run) for path in (top, *top.rglob("*"))]
    done = attempt(
        f"""
import json
for path in json.loads({json.dumps(json.dumps(folders))}):
    try:
        found = os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(1)
    except OSError:
        continue
    print("reached", path, found)
print("done")
"""
    )
    assert done.stdout == "done\n", done.stdout + done.stderr
    assert len(folders) > 30


def test_nothing_in_proc_tells_a_secret(running: Gateway) -> None:
    pids = [process.pid for process in running.processes()]
    done = attempt(
        f"""
for pid in {pids}:
    for name in ("cmdline", "environ", "maps", "mem", "fd"):
        path = f"/proc/{{pid}}/{{name}}"
        try:
            print(name, os.listdir(path) if name == "fd" else open(path, "rb").read())
        except OSError:
            continue
"""
    )
    assert len(pids) >= 6
    said = done.stdout
    assert "cmdline" in said, "command lines are everybody's to read: they must be harmless"
    assert not any(
        line.startswith(("environ b'", "mem", "fd", "maps b'")) and len(line) > 14 for line in said.splitlines()
    )
    assert [secret for secret in secrets_of(running) if secret in said] == []


def test_no_port_answers_another_user_with_anything_but_that_it_lives(running: Gateway) -> None:
    ports = ports_of(running)
    record = json.loads(running.layout.service_json.read_text())
    assert {record["port"], record["ray_port"]} <= set(ports)
    done = attempt(
        f"""
import json
context = ssl.create_default_context(); context.check_hostname = False; context.verify_mode = ssl.CERT_NONE
PATHS = ("/", "/v1/models", "/metrics", "/-/routes", "/-/healthz", "/api/version", "/gateway/v1/status", "/health")
for port, host in {ports}.items():
    for tls in (False, True):
        for path in PATHS:
            try:
                here = host.replace("0.0.0.0", "127.0.0.1").replace("::", "::1")
                with socket.create_connection((here, port), 5) as plain:
                    s = context.wrap_socket(plain) if tls else plain
                    s.settimeout(3)
                    s.sendall(f"GET {{path}} HTTP/1.1\\r\\nhost: x\\r\\nconnection: close\\r\\n\\r\\n".encode())
                    answer = b""
                    while piece := s.recv(65536): answer += piece
            except (OSError, ValueError) as error:
                continue
            print(json.dumps([port, tls, path, answer.decode("latin-1")]))
""",
        timeout_s=200,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    told = [entry for entry in answers if " 200 " in entry[3].split("\r\n")[0]]
    assert {(entry[0], entry[2]) for entry in told} <= {(record["port"], "/health")}, told
    assert [secret for secret in secrets_of(running) if secret in done.stdout] == []


def test_no_socket_in_the_file_system_can_be_connected_to(running: Gateway) -> None:
    sockets = [str(path) for path in running.layout.run.rglob("*") if path.is_socket()]
    assert {str(running.layout.owner_door), str(running.layout.edge_socket)} <= set(sockets)
    done = attempt(
        f"""
for path in {sockets}:
    try:
        with socket.socket(socket.AF_UNIX) as s: s.connect(path)
    except PermissionError:
        continue
    print("reached", path)
print("done")
"""
    )
    assert done.stdout == "done\n", done.stdout + done.stderr


def test_ports_that_a_crash_leaves_for_a_moment_tell_whoever_takes_them_nothing(running: Gateway) -> None:
    record = json.loads(running.layout.service_json.read_text())
    ports = [record["port"], record["ray_port"]]
    known = secrets_of(running)
    with squatting(ports) as other:
        (edge,) = [json.loads(running.layout.supervisor_status.read_text())["parts"]["edge"]["pid"]]
        head = heads_of(running.layout)[0]
        for pid in (edge, *(process.pid for process in descendants(head.pid)), head.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        wait_for(lambda: {event["port"] for event in other.events("bound")} >= set(ports), 30, "both are taken")
        for arguments in (("status",), ("models", "list"), ("chat", "alpha", PROMPT), ("blocks", "list")):
            subprocess.run(
                [sys.executable, "-m", "gateway_plugin.cli.main", "--state", str(running.layout.state), *arguments],
                env=running.environment, cwd=ROOT, capture_output=True, timeout=120, check=False,
            )  # fmt: skip
        wait_for(lambda: other.heard(record["ray_port"]), 60, "a part of Ray called whoever has the head's port")
        for port in ports:
            other.leave(port)
        wait_for(lambda: len(other.events("left")) == len(ports), 10, "the ports are free")
        heard = other.heard()
    assert [secret for secret in known if secret in heard] == []
    assert "authorization" not in heard.lower()
    wait_for(lambda: running.cli("status", check=False).returncode == 0, 120, "the gateway is whole again")
    assert running.chat("alpha", PROMPT).status_code == 200
