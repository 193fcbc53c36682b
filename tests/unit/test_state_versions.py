"""State files of the version before this one, and of a later one: ``status`` and ``down`` read both."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from gateway_plugin.blocks.ledger import BlockPhase, Ledger
from gateway_plugin.edge.keys import KeyStore
from gateway_plugin.engine_records import read_records
from gateway_plugin.errors import GatewayUnreachable
from gateway_plugin.globus import function_registry
from gateway_plugin.globus.endpoint.store import Records
from gateway_plugin.paths import Layout, private_folder
from gateway_plugin.processes import Mark
from gateway_plugin.service.status import report
from gateway_plugin.service.supervisor_state import read_status, supervisor_file
from gateway_plugin.service.up_down import Outcome, down
from gateway_plugin.service_state import read_record, write_record
from serve.agent import records

GONE = Mark(4_190_001, 1764150000.25, 123456, "0e1f3c52-7d1b-4a53-9d4e-6b1f00000001")
MARK = {"pid": GONE.pid, "started": GONE.started, "ticks": GONE.ticks, "boot": GONE.boot}
SERVICE = {
    "site": "local", "site_reference": "local", "catalog": "/s/models.yaml", "url": "https://127.0.0.1:8180",
    "bind": "127.0.0.1", "port": 8180, "tls": True, "head_address": "192.0.2.7", "ray_port": 6390, "serve_port": 8181,
    "host": socket.gethostname(), "own_certificate": True, "supervisor": MARK,
}  # fmt: skip
RUNNING = {
    "phase": "running", **MARK, "since": 1764150001.0, "restarts": 1, "deaths": 0, "retry_at": 0.0,
    "last_error": "exit code 1",
}  # fmt: skip
DOWN = {
    "phase": "down", "pid": None, "started": None, "since": 0.0, "restarts": 0, "deaths": 0, "retry_at": 0.0,
    "last_error": "",
}  # fmt: skip
SUPERVISOR = {
    "service": SERVICE, "stage": "running", "updated": 1764150002.0, "supervisor": MARK,
    "parts": {"edge": RUNNING, "head": RUNNING, "serve": DOWN},
}  # fmt: skip
BLOCK = {
    "asked_at": 1764150000.0, "ended_at": None, "ends_at": None, "name": "gw-local-01234567", "node": "login1",
    "job": {"id": str(GONE.pid), "script": "/s/x.sh", **MARK}, "phase": "running", "reason": None,
    "starts_at": 1764150000.5, "tags": {"ray-node-type": "local"}, "type": "local",
}  # fmt: skip
KEYS = {
    "keys": [
        {"name": "ann", "role": "user", "sha256": "0" * 64, "created": 1764150000.5},
        {"name": "old", "role": "admin", "sha256": "1" * 64, "created": 1764150000.5, "revoked": True},
    ]
}
ENGINE = {
    "engine": "e1", "model": "org/m", "task": "generate", "node": "n1", "block": "gw-local-01234567", **MARK,
    "host": "127.0.0.1", "port": 4000, "epoch": 3, "generation": 7, "gpus": [0], "memory_mib": 512, "log": "/l",
    "key": "s3cret", "secrets": [], "ready": False, "loaded_s": None, "hang_after_s": 300.0,
}  # fmt: skip
FUNCTIONS = {"entry_point": "infer", "functions": [{"version": "1.0.0", "sha256": "2" * 64, "id": "f-1"}]}
ENDPOINT = {
    "id": "i", "venv": "/v", "functions": ["f-1"], "answers": "/a", "options": {"url": None, "workers": 3},
    "process": MARK, "host": "login1",
}  # fmt: skip


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    made = Layout(tmp_path / "state")
    made.make()
    return made


def later(document: Any) -> Any:
    """With a key that this version does not know, in every object."""
    if isinstance(document, list):
        return [later(entry) for entry in document]
    if not isinstance(document, dict):
        return document
    values = {name: value if name == "tags" else later(value) for name, value in document.items()}
    return {**values, "of_a_later_version": {"x": [1]}}


@pytest.fixture(params=["before", "later"])
def write(layout: Layout, request: pytest.FixtureRequest) -> None:
    """All state files."""
    files = {
        layout.service_json: SERVICE,
        layout.supervisor_status: SUPERVISOR,
        layout.ledger: {"version": 1, "blocks": [BLOCK]},
        layout.keys_json: KEYS,
        layout.engine_records / "e1.json": ENGINE,
        private_folder(layout.endpoints) / "functions.json": FUNCTIONS,
        layout.endpoints / "e.endpoint": ENDPOINT,
    }
    for path, document in files.items():
        path.write_text(json.dumps(later(document) if request.param == "later" else document))


@pytest.mark.usefixtures("write")
def test_every_state_file_is_read(layout: Layout) -> None:
    record = read_record(layout)
    assert record is not None
    assert (record.url, record.port, record.supervisor) == ("https://127.0.0.1:8180", 8180, GONE)
    status = read_status(layout)
    assert (status.stage, status.supervisor, status.part("head").mark) == ("running", GONE, GONE)
    assert (status.part("edge").restarts, status.part("edge").last_error) == (1, "exit code 1")
    (block,) = Ledger(layout.ledger).read().values()
    assert (block.phase, block.job and block.job.mark, block.tags["ray-node-type"]) == (
        BlockPhase.RUNNING, GONE, "local",
    )  # fmt: skip
    assert [(key.name, key.revoked) for key in KeyStore(layout).list()] == [("ann", False), ("old", True)]
    (engine,) = records.read_all(layout)
    assert (engine.mark, engine.address, engine.key) == (GONE, "127.0.0.1:4000", "s3cret")
    assert [found.leader for found in read_records(layout.engine_records)] == [GONE]
    assert [function.id for function in function_registry.read(layout.functions)] == ["f-1"]
    endpoint = Records(layout.endpoints).known("e")
    assert (endpoint.process, endpoint.options.workers) == (GONE, 3)


def silent(_: Layout) -> dict[str, object]:
    raise GatewayUnreachable("nobody answers")


@pytest.mark.usefixtures("write")
def test_status_and_down_work(layout: Layout) -> None:
    found = report(layout.state, silent)
    assert (found["state"], found["url"], found["site"]) == ("down", "https://127.0.0.1:8180", "local")
    assert down(layout.state).outcome in (Outcome.NOTHING_RAN, Outcome.ENDED)
    assert not layout.run.exists()


def test_what_a_later_version_wrote_is_kept(layout: Layout) -> None:
    layout.service_json.write_text(json.dumps(later(SERVICE)))
    layout.supervisor_status.write_text(json.dumps(later(SUPERVISOR)))
    layout.keys_json.write_text(json.dumps(later(KEYS)))
    layout.edge.mkdir(exist_ok=True)
    record = read_record(layout)
    assert record is not None
    write_record(layout, record)
    supervisor_file(layout).write(read_status(layout))
    KeyStore(layout).create("bob", "user")
    for path in (layout.service_json, layout.supervisor_status, layout.keys_json):
        assert json.loads(path.read_text())["of_a_later_version"] == {"x": [1]}
    assert json.loads(layout.keys_json.read_text())["keys"][0]["of_a_later_version"] == {"x": [1]}
