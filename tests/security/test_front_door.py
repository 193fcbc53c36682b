"""Another user sits on the front door's port: before the gateway is up, beside it, after a crash, after ``down``.

Nothing that the gateway's own user then does may tell that user a key, a prompt, or anything else that is not public.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from gateway_plugin.edge.process import prepare
from tests.support.edges import edge_site, running_edge
from tests.support.gateways import ROOT, Gateway, wait_for
from tests.support.stranger import needs_root, squatting

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300), needs_root]

PROMPT = "a-prompt-that-is-nobody-elses"

OWN_COMMANDS = (
    ("status",),
    ("models", "list"),
    ("models", "load", "alpha"),
    ("chat", "alpha", PROMPT),
    ("embed", "alpha", PROMPT),
    ("blocks", "list"),
    ("keys", "list"),
    ("doctor",),
)

IN_PYTHON = f"""
from gateway_plugin import Client
from gateway_plugin.apps import Place, _run_chat
from gateway_plugin.errors import GatewayError
for ask in (
    lambda: Client().models(),
    lambda: Client().openai.models.list(),
    lambda: _run_chat({PROMPT!r}, "alpha", {{}}, Place()),
):
    try:
        ask()
    except (GatewayError, Exception) as error:
        print(type(error).__name__)
"""


@pytest.fixture(scope="module")
def down(shared: Gateway) -> Gateway:
    """A gateway that ran, and was brought down: its state folder names the port, and holds the keys."""
    shared.up()  # it is, after the tests of neighbours
    shared.cli("down")
    return shared


def secrets_of(made: Gateway) -> list[str]:
    """What nobody else may ever read."""
    layout = made.layout
    files = (layout.admin_key, layout.edge_secret, layout.ray_token)
    return [path.read_text().strip() for path in files if path.exists()]


def front_port(made: Gateway) -> int:
    return int(json.loads(made.layout.service_json.read_text())["port"])


def run_all(made: Gateway, state: Path | None = None) -> None:
    """Every command of the owner that asks the gateway something; what they exit with is not the point."""
    said = {arguments: made.cli(*arguments, check=False) for arguments in OWN_COMMANDS}
    assert said["models", "list"].returncode == 69
    assert "gateway" in said["models", "list"].stderr
    environment = {**made.environment, "GATEWAY_STATE": str(state or made.layout.state)}
    subprocess.run([sys.executable, "-c", IN_PYTHON], env=environment, cwd=ROOT, timeout=120, check=True)


def test_the_port_of_a_gateway_that_is_down_is_told_nothing(down: Gateway) -> None:
    with squatting([front_port(down)]) as other:
        wait_for(lambda: other.events("bound"), 10, "the other user has the port")
        run_all(down)
        assert other.events("connected") == []
        assert other.heard() == ""


def test_up_names_the_port_that_another_user_holds_and_tells_it_nothing(down: Gateway) -> None:
    with squatting([front_port(down)]) as other:
        wait_for(lambda: other.events("bound"), 10, "the other user has the port")
        done = down.cli("up", check=False)
        assert done.returncode == 69
        assert f"port {front_port(down)} (front door): in use by" in done.stderr
        assert "user nobody (uid 65534)" in done.stderr
        assert not any(secret in other.heard() for secret in secrets_of(down))


def test_a_state_folder_seen_from_another_login_node_has_its_key_sent_to_no_loopback(
    down: Gateway, tmp_path: Path
) -> None:
    record = json.loads(down.layout.service_json.read_text())
    other_host = {**record, "host": "login01.other", "supervisor": {"pid": 4242, "started": 1.0}}
    down.layout.service_json.write_text(json.dumps(other_host))
    try:
        with squatting([front_port(down)]) as other:
            wait_for(lambda: other.events("bound"), 10, "the other user has the port")
            run_all(down)
            assert other.events("connected") == []
            said = json.loads(down.cli("status", "--json", check=False).stdout)
            assert said["state"] == "remote"
            assert "login01.other" in said["gateway_error"]
    finally:
        down.layout.service_json.write_text(json.dumps(record))


async def test_while_the_edge_restarts_callers_that_verify_tell_the_port_nothing() -> None:
    async with running_edge() as edge:
        site = edge_site(edge.site.port).model_copy(update={"plain_http": False})
        edge.kill()
        prepare(edge.layout, site, slots=4, servers_per_slot=3)
        with squatting([site.port]) as other:
            wait_for(lambda: other.events("bound"), 10, "the other user has the port")
            headers = {"authorization": f"Bearer {edge.user_key}"}
            trust = httpx.create_ssl_context(verify=str(edge.layout.ca))
            async with httpx.AsyncClient(verify=trust, headers=headers) as client:
                with pytest.raises(httpx.TransportError):
                    await client.post(f"https://127.0.0.1:{site.port}/v1/chat/completions", json={"prompt": PROMPT})
            heard = other.heard()
            assert heard.startswith("\x16\x03"), "no more than the greeting of TLS"
            assert edge.user_key not in heard
            assert PROMPT not in heard


def test_a_state_folder_that_another_user_made_first_starts_nothing(tmp_path: Path) -> None:
    shared = tmp_path / "scratch"
    shared.mkdir()
    shared.chmod(0o1777)
    state, trap, proof = shared / "gw", shared / "site.py", shared / "executed"
    state.mkdir(mode=0o755)
    trap.write_text(f"open({str(proof)!r}, 'w').write('yes')\nraise SystemExit\n")
    record = {
        "site": "local", "site_reference": str(trap), "catalog": "/x", "url": "http://127.0.0.1:8180",
        "bind": "127.0.0.1", "port": 8180, "tls": False, "head_address": "127.0.0.1", "ray_port": 6390,
        "host": os.uname().nodename, "supervisor": None,
    }  # fmt: skip
    (state / "service.json").write_text(json.dumps(record))
    (state / "admin.key").write_text("gw-not-yours")
    for path in (state, state / "service.json", state / "admin.key", trap):
        os.chown(path, 65534, 65534)
    for arguments in (
        ("up",),
        ("up", "--dry-run"),
        ("down",),
        *OWN_COMMANDS,
        ("logs",),
        ("ca",),
        ("keys", "create", "x"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "gateway_plugin.cli.main", "--state", str(state), *arguments],
            capture_output=True, text=True, timeout=60, cwd=ROOT, check=False,
        )  # fmt: skip
        assert done.returncode != 0, arguments
        assert "is not a folder of this user" in done.stderr, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
    assert not proof.exists()
    assert sorted(path.name for path in state.iterdir()) == ["admin.key", "service.json"]


def test_a_run_folder_whose_name_is_taken_does_not_keep_the_gateway_from_starting(
    down: Gateway, tmp_path: Path
) -> None:
    name = down.layout.run
    victim = tmp_path / "home"
    (victim / "ray").mkdir(parents=True)
    assert not name.exists()
    name.symlink_to(victim)
    os.chown(name, 65534, 65534, follow_symlinks=False)
    try:
        down.cli("down")
        assert (victim / "ray").is_dir(), "'down' removed what a link led to"
        down.up()
        assert down.layout.run.name == f"{name.name}-1"
        assert down.chat("alpha").status_code == 200
        os.kill(json.loads(down.layout.supervisor_status.read_text())["parts"]["edge"]["pid"], signal.SIGKILL)
        wait_for(lambda: down.cli("status", check=False).returncode == 0, 60, "the edge is back")
        assert down.chat("alpha").status_code == 200
        down.cli("down")
        assert not down.layout.run.is_dir() or down.layout.run == name
        assert [path.name for path in victim.iterdir()] == ["ray"]
    finally:
        name.unlink()
