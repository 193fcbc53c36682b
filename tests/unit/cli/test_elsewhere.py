"""First steps that would go wrong silently: which gateway a command means, and what it says where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gateway_plugin.cli.main import cli
from gateway_plugin.edge.keys import KeyStore
from gateway_plugin.paths import Layout
from gateway_plugin.service.deployment import record_of
from gateway_plugin.service_state import write_record
from gateway_plugin.site import load_site
from tests.unit.sizing.published import PUBLISHED

ELSEWHERE = "https://gpu.example.org:8180"


@pytest.fixture(autouse=True)
def _own_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))


def gateway(state: Path, *arguments: str, url: str = "", explicit: bool = False, key: str = "") -> Result:
    """With ``GATEWAY_URL``; the state folder by the environment, or by ``--state``."""
    given = ["--state", str(state), *arguments] if explicit else list(arguments)
    environment = {"GATEWAY_URL": url, "GATEWAY_API_KEY": key, "GATEWAY_STATE": str(state), "GATEWAY_PLAIN_HTTP": "1"}
    return CliRunner(env=environment).invoke(cli, given, catch_exceptions=False)


def started(state: Path) -> None:
    """A gateway was up here, at https://127.0.0.1:8180."""
    layout = Layout(state)
    layout.make()
    write_record(layout, record_of(load_site("local"), "local", Path("models.yaml"), "127.0.0.1"))


@pytest.mark.parametrize(
    "command",
    [("keys", "create", "ann"), ("keys", "list"), ("keys", "revoke", "ann"), ("logs",), ("logs", "edge"), ("ca",),
     ("blocks", "logs", "gw-x")],
)  # fmt: skip
def test_what_lies_on_the_gateways_machine_is_not_taken_from_another(tmp_path: Path, command: tuple[str, ...]) -> None:
    state = tmp_path / "state"
    done = gateway(state, *command, url=ELSEWHERE)
    assert done.exit_code == 2
    assert ELSEWHERE in done.stderr
    assert "run this there" in done.stderr
    assert "unset GATEWAY_URL" in done.stderr
    assert not state.exists(), "no key was made that works nowhere"
    error = json.loads(gateway(state, *command, "--json", url=ELSEWHERE).stdout)["error"]
    assert ELSEWHERE in error["message"]


def test_a_state_folder_that_is_named_or_is_that_gateways_is_meant(tmp_path: Path) -> None:
    state = tmp_path / "state"
    started(state)
    assert gateway(state, "keys", "create", "ann", url=ELSEWHERE, explicit=True).exit_code == 0
    assert gateway(state, "keys", "create", "bob", url="https://127.0.0.1:8180/v1/").exit_code == 0
    assert {key.name for key in KeyStore(Layout(state)).list()} == {"ann", "bob"}


def test_a_key_made_before_the_first_up_says_where_it_works_and_when(tmp_path: Path) -> None:
    done = gateway(tmp_path / "state", "keys", "create", "ann")
    assert done.exit_code == 0
    assert "No gateway was started from" in done.stderr
    assert "works once 'gateway up' has" in done.stderr
    document = json.loads(gateway(tmp_path / "state", "keys", "create", "bob", "--json").stdout)
    assert "No gateway was started" in document["note"]


def test_a_key_for_a_gateway_that_is_down_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state"
    started(state)
    done = gateway(state, "keys", "create", "ann")
    assert "does not run: the key works once it is up" in done.stderr
    assert "GATEWAY_URL=https://127.0.0.1:8180" in done.stderr
    monkeypatch.setattr("gateway_plugin.service.discovery.edges_of", lambda layout: (object(),))
    assert json.loads(gateway(state, "keys", "create", "bob", "--json").stdout)["note"] is None


def test_down_minds_that_other_commands_ask_another(tmp_path: Path) -> None:
    done = gateway(tmp_path / "state", "down", url=ELSEWHERE)
    assert f"GATEWAY_URL is {ELSEWHERE}" in done.stderr
    assert "GATEWAY_URL" not in gateway(tmp_path / "state", "down").stderr


@pytest.mark.process
def test_doctor_says_that_it_is_not_about_the_gateway_elsewhere(tmp_path: Path) -> None:
    found = {c["name"]: c for c in json.loads(gateway(tmp_path / "s", "doctor", "--json", url=ELSEWHERE).stdout)}
    assert found["GATEWAY_URL"]["verdict"] == "warn"
    assert "on its own machine" in found["GATEWAY_URL"]["advice"]
    assert "GATEWAY_URL" not in {c["name"] for c in json.loads(gateway(tmp_path / "s", "doctor", "--json").stdout)}


# --- status of a gateway elsewhere ---
Answer = Callable[[str], tuple[int, Any]]


@contextmanager
def listening(answer: Answer) -> Iterator[str]:
    """A gateway over plain HTTP on loopback: ``answer(path)`` gives status and document."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers["content-length"] or 0))
            status, document = answer(self.path)
            text = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


MODEL = {"id": "tiny", "state": "ready", "in_flight": 2, "waiting": 0}


def refusal(code: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "x", "code": code, "param": None}}


def test_status_asks_the_gateway_elsewhere(tmp_path: Path) -> None:
    def admin(path: str) -> tuple[int, Any]:
        assert path == "/gateway/v1/status"
        return 200, {"state": "ready", "models": [MODEL], "waiting": 0, "switches": 3}

    with listening(admin) as url:
        done = gateway(tmp_path / "s", "status", url=url, key="k")
        document = json.loads(gateway(tmp_path / "s", "status", "--json", url=url, key="k").stdout)
    assert done.exit_code == 0
    assert f"gateway: ready at {url}" in done.stdout
    assert "tiny" in done.stdout
    assert (document["state"], document["url"], document["gateway"]["switches"]) == ("ready", url, 3)


def test_a_users_key_sees_the_models(tmp_path: Path) -> None:
    def user(path: str) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [MODEL]}
        return 403, refusal("forbidden", "This needs an admin key.")

    with listening(user) as url:
        done = gateway(tmp_path / "s", "status", url=url, key="k")
    assert (done.exit_code, "tiny" in done.stdout) == (0, True)


@pytest.mark.parametrize(
    ("status", "code", "exit_code", "says"),
    [
        (503, "going_down", 3, "gateway: stopping"),
        (503, "unavailable", 3, "gateway: degraded"),
        (401, "invalid_api_key", 77, "not known here"),
    ],
)
def test_a_gateway_elsewhere_that_does_not_serve_says_why(
    tmp_path: Path, status: int, code: str, exit_code: int, says: str
) -> None:
    with listening(lambda path: (status, refusal(code, "This API key is not known here"))) as url:
        done = gateway(tmp_path / "s", "status", url=url, key="k")
    assert done.exit_code == exit_code
    assert says in done.output


def test_nobody_there_is_told_without_sending_anybody_to_gateway_up(tmp_path: Path) -> None:
    with listening(lambda path: (200, {})) as url:
        pass
    done = gateway(tmp_path / "s", "status", url=url, key="k")
    assert done.exit_code == 3
    assert f"gateway: unreachable at {url}" in done.stdout
    assert "gateway up" not in done.output
    assert "tunnel" in done.output
    listed = gateway(tmp_path / "s", "models", "list", url=url, key="k")
    assert listed.exit_code == 69
    assert "gateway up" not in listed.output


# --- a newcomer's first words ---
@pytest.mark.process
def test_without_a_catalog_up_and_doctor_say_how_to_name_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = gateway(tmp_path / "s", "up")
    assert done.exit_code == 2
    assert f"there is no {tmp_path}/models.yaml" in done.stderr
    assert "--models FILE" in done.stderr
    checks = json.loads(gateway(tmp_path / "s", "doctor", "--json").stdout)
    (found,) = [check for check in checks if check["name"] == "catalog"]
    assert (found["verdict"], "--models FILE" in found["found"]) == ("warn", True)


@pytest.mark.process
def test_doctor_reads_the_catalog_that_up_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.yaml").write_text("models: {ear: {source: openai/whisper-small, memory_gib: 1}}")
    done = gateway(tmp_path / "s", "doctor", "--json")
    found = {check["name"]: check["verdict"] for check in json.loads(done.stdout)}
    assert (done.exit_code, found["catalog"], found["kind of ear"]) == (1, "ok", "fail")
    (tmp_path / "models.yaml").write_text("models: [")
    assert gateway(tmp_path / "s", "doctor").exit_code == 1


def test_where_there_is_nothing_to_list_that_is_said_and_json_is_an_empty_list(tmp_path: Path) -> None:
    state = tmp_path / "s"
    for command, says in ((("keys", "list"), f"no keys in {state}"), (("logs",), f"no logs in {state}")):
        done = gateway(state, *command)
        assert (done.exit_code, done.stdout) == (0, "")
        assert says in done.stderr
        assert json.loads(gateway(state, *command, "--json").stdout) == []


def test_down_where_nothing_runs_does_not_say_that_it_ends_anything(tmp_path: Path) -> None:
    state = tmp_path / "s"
    state.mkdir(0o700)
    done = gateway(state, "down")
    assert (done.exit_code, done.output) == (0, f"nothing ran from {state}\n")


def test_status_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    done = gateway(tmp_path / "s", "status")
    assert done.exit_code == 3
    assert "'gateway up' starts it" in done.stdout
    assert "GATEWAY_URL" in done.stdout


# --- a catalog for a gateway elsewhere ---
TYPES = [{"type": "cpu", "host_mib": 4096, "gpu_mib": []}, {"type": "gpu", "host_mib": 0, "gpu_mib": [9000, 9000]}]


def applied(tmp_path: Path, types: list[dict[str, Any]], entry: str) -> Result:
    """``models apply`` of a catalog with a Llama-3.2-1B, whose context of 131072 tokens takes 4 GiB by itself."""
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text(json.dumps(PUBLISHED["Llama-3.2-1B"][1]))
    file = tmp_path / "models.yaml"
    file.write_text(f"models:\n  small: {{source: {weights}, {entry}}}\n")

    def admin(path: str) -> tuple[int, Any]:
        return 200, {"state": "ready", "types": types, "ok": True}

    with listening(admin) as url:
        return gateway(tmp_path / "s", "models", "apply", str(file), url=url, key="k")


def test_memory_is_worked_out_for_the_node_types_of_the_gateway_elsewhere(tmp_path: Path) -> None:
    refused = applied(tmp_path, TYPES, "gpus: 4")
    assert refused.exit_code == 2
    assert "it fits on no node type with 4 GPUs: gpu: " in " ".join(refused.stderr.split())


def test_a_gateway_elsewhere_that_does_not_tell_its_node_types_is_named(tmp_path: Path) -> None:
    earlier = [{"type": "gpu", "running": 1}]
    done = applied(tmp_path, earlier, "gpus: 4")
    assert done.exit_code == 0
    assert "does not tell its node types" in done.stderr


def test_where_every_memory_is_said_no_node_type_is_asked_for(tmp_path: Path) -> None:
    done = applied(tmp_path, [], "gpus: 4, memory_gib: 9")
    assert (done.exit_code, done.stderr) == (0, "")
