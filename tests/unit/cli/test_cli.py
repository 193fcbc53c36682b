"""The command line: parsing, exit codes, JSON, one-line errors."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gateway_plugin import __version__
from gateway_plugin.cli.main import cli
from gateway_plugin.edge.keys import KeyStore
from gateway_plugin.paths import Layout
from gateway_plugin.tls import make_authority
from tests.support.owner_doors import owner_door


def gateway(state: Path, *arguments: str, stdin: str | None = None) -> Result:
    return CliRunner(env={"GATEWAY_URL": "", "GATEWAY_API_KEY": ""}).invoke(
        cli, ["--state", str(state), *arguments], input=stdin, catch_exceptions=False
    )


def test_version_and_help_with_exit_codes(tmp_path: Path) -> None:
    assert __version__ in gateway(tmp_path, "--version").stdout
    words = gateway(tmp_path, "--help").stdout
    assert "Exit codes" in words
    assert all(name in words for name in ("up", "down", "status", "doctor", "logs", "models", "keys", "blocks", "chat"))


@pytest.mark.parametrize(
    "path",
    ["up", "down", "status", "doctor", "logs", "models plan", "models add",
     "models prepare", "models list", "models show", "models load",
     "models unload", "models pin", "models unpin", "models apply", "keys create", "keys list", "keys revoke",
     "blocks list", "blocks drain", "blocks retry", "chat", "embed", "controller replay"],
)  # fmt: skip
def test_every_command_explains_itself_and_speaks_json(tmp_path: Path, path: str) -> None:
    done = gateway(tmp_path, *path.split(), "--help")
    assert done.exit_code == 0
    assert "--json" in done.stdout


def test_a_wrong_command_line_is_2(tmp_path: Path) -> None:
    assert gateway(tmp_path, "up", "--nonsense").exit_code == 2
    assert gateway(tmp_path, "nonsense").exit_code == 2
    assert gateway(tmp_path, "up", "--port", "80").exit_code == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models: {m: {source: x, memory_gib: 1, colour: red}}", "models.m.colour"),
        ("models: {m: {source: x, memory_gib: -1}}", "models.m.memory_gib"),
        ("models: [", "YAML"),
        ("modles: {}", "models"),
    ],
)
def test_a_wrong_catalog_is_one_line_and_2_and_nothing_is_made(tmp_path: Path, text: str, expected: str) -> None:
    catalog = tmp_path / "models.yaml"
    catalog.write_text(text)
    state = tmp_path / "state"
    done = gateway(state, "up", "--site", "local", "--models", str(catalog))
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {catalog}")
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not state.exists()


def test_a_wrong_site_is_2_and_an_error_is_json_where_asked_for(tmp_path: Path) -> None:
    catalog = tmp_path / "models.yaml"
    catalog.write_text("models: {}")
    done = gateway(tmp_path / "state", "up", "--site", "atlantis", "--models", str(catalog), "--json")
    assert done.exit_code == 2
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "invalid_configuration"
    assert "atlantis" in error["message"]


def test_status_of_nothing_is_3_and_down_of_nothing_is_0(tmp_path: Path) -> None:
    done = gateway(tmp_path / "state", "status", "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["state"] == "down"
    done = gateway(tmp_path / "state", "down")
    assert (done.exit_code, done.stdout) == (0, f"nothing ran from {tmp_path}/state\n")
    assert not (tmp_path / "state").exists()


def test_a_client_command_without_a_gateway_says_what_to_do(tmp_path: Path) -> None:
    done = gateway(tmp_path / "state", "models", "list")
    assert done.exit_code == 69
    assert "gateway up" in done.stderr
    assert "Traceback" not in done.output


def test_keys_are_made_once_listed_without_secrets_and_revoked(tmp_path: Path) -> None:
    made = gateway(tmp_path, "keys", "create", "ann", "--role", "admin", "--json")
    secret = json.loads(made.stdout)["secret"]
    assert gateway(tmp_path, "keys", "create", "ann").exit_code == 64
    listed = gateway(tmp_path, "keys", "list", "--json")
    assert [(key["name"], key["role"]) for key in json.loads(listed.stdout)] == [("ann", "admin")]
    assert secret not in listed.stdout
    assert secret not in (tmp_path / "keys.json").read_text()
    assert gateway(tmp_path, "keys", "revoke", "ann").exit_code == 0
    assert gateway(tmp_path, "keys", "revoke", "ann").exit_code == 66
    bare = gateway(tmp_path, "keys", "create", "bob")
    assert bare.stdout.strip().startswith("gw-")
    assert len(bare.stdout.strip().splitlines()) == 1


def test_revoking_its_own_key_leaves_the_command_line_with_a_new_one(tmp_path: Path) -> None:
    KeyStore(Layout(tmp_path)).keep_cli_key()
    before = (tmp_path / "admin.key").read_text()
    done = gateway(tmp_path, "keys", "revoke", "admin-cli")
    assert done.exit_code == 0
    assert "a new one" in done.output
    after = (tmp_path / "admin.key").read_text()
    assert after not in (before, "")
    (key,) = KeyStore(Layout(tmp_path)).list()
    assert key.sha256 == hashlib.sha256(after.encode()).hexdigest()


def test_logs_without_any(tmp_path: Path) -> None:
    assert json.loads(gateway(tmp_path, "logs", "--json").stdout) == []
    done = gateway(tmp_path, "logs", "edge")
    assert done.exit_code == 66


def test_an_empty_prompt_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with owner_door(tmp_path, BaseHTTPRequestHandler):
        assert gateway(tmp_path, "chat", "m", stdin="").exit_code == 64
        assert gateway(tmp_path, "embed", "m", stdin="").exit_code == 64
    assert gateway(tmp_path, "chat", "m", stdin="hello").exit_code == 69


def test_an_endpoint_without_a_function_is_said_and_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GATEWAY_FUNCTION", raising=False)
    monkeypatch.setenv("GATEWAY_STATE", str(tmp_path))
    for command in (("chat", "m", "hello"), ("embed", "m", "hello")):
        said = gateway(tmp_path, *command, "--endpoint", "0" * 8)
        assert said.exit_code == 2
        assert "GATEWAY_FUNCTION" in said.stderr
    monkeypatch.setenv("GATEWAY_FUNCTION", "f")
    assert "endpoint id" in gateway(tmp_path, "chat", "m", "hello", "--endpoint", "my-endpoint").stderr


@pytest.mark.process
def test_doctor_fails_on_a_wrong_catalog(tmp_path: Path) -> None:
    catalog = tmp_path / "models.yaml"
    catalog.write_text("models: {m: {}}")
    done = gateway(tmp_path / "state", "doctor", "--site", "local", "--models", str(catalog), "--json")
    assert done.exit_code == 1
    assert next(c["name"] for c in json.loads(done.stdout) if c["verdict"] == "fail") == "catalog"


@pytest.mark.parametrize("grace", ["nan", "-1"])
def test_a_grace_that_is_no_number_of_seconds_is_refused(tmp_path: Path, grace: str) -> None:
    done = gateway(tmp_path / "state", "down", "--grace", grace)
    assert done.exit_code == 2
    assert "--grace" in done.stderr


@pytest.mark.process
def test_the_client_commands_need_no_ray() -> None:
    code = (
        "import sys; sys.modules['ray'] = sys.modules['parsl'] = sys.modules['psutil'] = None\n"
        "from gateway_plugin.cli.main import cli\n"
        "from gateway_plugin.cli.connection import connect\n"
        "import gateway_plugin.client\n"
        "cli(['--state', '/nonexistent/gateway', 'models', 'list'], prog_name='gateway')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 69, done.stderr
    assert "gateway up" in done.stderr


@pytest.mark.process
def test_a_provider_that_cannot_work_is_2_and_in_one_line(tmp_path: Path) -> None:
    place = tmp_path / "queue.py"
    place.write_text(
        "from parsl.providers import PBSProProvider\n"
        "from gateway_plugin.site import NodeType, Site\n"
        "kind = NodeType(name='q', provider=PBSProProvider(), cpus=1, engine_memory_gib=1)\n"
        "site = Site(name='queue', node_types=(kind,))\n"
    )
    catalog = tmp_path / "models.yaml"
    catalog.write_text("models: {}")
    state = tmp_path / "state"
    done = gateway(state, "up", "--site", str(place), "--models", str(catalog))
    assert done.exit_code == 2
    assert "provider of q: PBSProProvider" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (state / "service.json").exists()
    doctor = gateway(state, "doctor", "--site", str(place), "--models", str(catalog), "--json")
    assert doctor.exit_code == 1
    assert "provider of q" in [c["name"] for c in json.loads(doctor.stdout) if c["verdict"] == "fail"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("prefix", "name", "says"),
    [
        (["nohup"], "SIGHUP", "lives"),
        (["env", "--default-signal=HUP"], "SIGHUP", "interrupted"),
        (["nohup"], "SIGTERM", "interrupted"),
    ],
)
def test_a_closed_terminal_interrupts_up_unless_it_runs_under_nohup(prefix: list[str], name: str, says: str) -> None:
    code = (
        "import os, signal\n"
        "from gateway_plugin.cli.service import interrupt_on_signals\n"
        "interrupt_on_signals()\n"
        "try:\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    print('lives')\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    done = subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == says, done.stderr


def test_the_certificate_of_the_authority_is_printed_for_callers(tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert gateway(state, "ca").exit_code == 66
    make_authority(Layout(state))
    assert gateway(state, "ca").stdout == Layout(state).ca.read_text()
    assert gateway(state, "ca", "--path").stdout.strip() == str(Layout(state).ca)
