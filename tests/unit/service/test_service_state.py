"""What is written down, and what is told from it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gateway_plugin.catalog import catalog_document, parse_catalog
from gateway_plugin.errors import GatewayUnreachable, NotFound, ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.processes import Mark, mark
from gateway_plugin.service.deployment import record_of
from gateway_plugin.service.logs import find_logs, last_lines, log_named
from gateway_plugin.service.restart_policy import Part, Phase, Plan
from gateway_plugin.service.status import report
from gateway_plugin.service.supervisor_state import PartState, read_status, supervisor_file, supervisor_state
from gateway_plugin.service.up_down import Outcome, down, up
from gateway_plugin.service_state import RecordGarbled, ServiceRecord, read_record, recover_record, write_record
from gateway_plugin.state_file import state_text
from tests.support.disks import full_disk
from tests.unit.service.test_preflight import site


@pytest.fixture(autouse=True)
def _own_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    record = record_of(site(), "local", tmp_path / "models.yaml", "192.0.2.1")
    write_record(layout, record)
    assert read_record(layout) == record
    assert record.url == "https://127.0.0.1:20011"
    assert layout.service_json.stat().st_mode & 0o777 == 0o600


def test_a_path_that_is_no_utf_8_survives_its_record_and_the_supervisors_copy(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "state")
    layout.make()
    catalog = tmp_path / os.fsdecode(b"caf\xe9.yaml")
    record = record_of(site(), os.fsdecode(b"./caf\xe9.py"), catalog, "192.0.2.1")
    write_record(layout, record)
    assert read_record(layout) == record
    assert record.catalog == str(catalog)
    own = mark(os.getpid())
    assert own is not None
    supervisor_file(layout).write(supervisor_state(Plan(), "running", own, 1.0, record))
    layout.service_json.unlink()
    assert read_record(layout) == record


@pytest.mark.parametrize("malformed", [7, None, "running", []])
def test_one_malformed_part_takes_no_other_with_it(tmp_path: Path, malformed: object) -> None:
    layout = Layout(tmp_path / "state")
    layout.make()
    parts = {"edge": {"phase": "running", "restarts": 2}, "head": malformed, "serve": {"phase": ["?"], "restarts": 1}}
    layout.supervisor_status.write_text(json.dumps({"stage": "running", "parts": parts}))
    found = read_status(layout)
    assert (found.part("edge").phase, found.part("edge").restarts) == (Phase.RUNNING, 2)
    assert found.part("head") == PartState()
    assert (found.part("serve").phase, found.part("serve").restarts) == (Phase.DOWN, 1)


def test_a_record_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    document = record_of(site(), "local", tmp_path / "models.yaml", "192.0.2.1").model_dump(mode="json")
    del document["own_certificate"]
    layout.service_json.write_text(json.dumps(document))
    found = read_record(layout)
    assert found is not None
    assert found.own_certificate is False


GARBLED = ("", "{", '{"site": ', "[]", "7", "\x00\x01", "null")


@pytest.mark.parametrize("garbled", GARBLED)
def test_a_garbled_record_is_set_aside_and_the_supervisors_copy_taken(tmp_path: Path, garbled: str) -> None:
    layout = Layout(tmp_path)
    layout.run.mkdir(mode=0o700)
    layout.service_json.write_text(garbled)
    with pytest.raises(RecordGarbled, match=r"service\.json is garbled"):
        read_record(layout)
    record = record_of(site(), "local", tmp_path / "models.yaml", "192.0.2.1")
    state = supervisor_state(Plan(), "running", Mark(2**22 - 3, 1.0), 0.0, record)
    layout.supervisor_status.write_text(state_text(state))
    assert read_record(layout) == record
    assert "had noted elsewhere" in recover_record(layout)
    assert (tmp_path / "service.json.garbled").read_text() == garbled
    layout.supervisor_status.unlink()
    assert read_record(layout) == record
    assert recover_record(layout) == ""


@pytest.mark.parametrize("garbled", [*GARBLED, None])
def test_a_record_that_is_lost_on_a_full_disk_stops_no_down(tmp_path: Path, garbled: str | None) -> None:
    layout = Layout(tmp_path)
    layout.run.mkdir(mode=0o700)
    record = record_of(site(), "local", tmp_path / "models.yaml", "192.0.2.1")
    state = supervisor_state(Plan(), "running", Mark(2**22 - 3, 1.0), 0.0, record)
    layout.supervisor_status.write_text(state_text(state))
    if garbled is not None:
        layout.service_json.write_text(garbled)
    with full_disk():
        note = recover_record(layout)
        assert ("No space" in note) is (garbled is not None)
        assert read_record(layout) == record
        assert layout.service_json.exists() is (garbled is not None)
        ended = down(tmp_path)
    assert (ended.outcome, ended.url) == (Outcome.NOTHING_RAN, record.url)


@pytest.mark.parametrize("garbled", GARBLED)
def test_a_garbled_record_without_a_copy_locks_nobody_out(tmp_path: Path, garbled: str) -> None:
    layout = Layout(tmp_path)
    layout.run.mkdir(mode=0o700)
    layout.service_json.write_text(garbled)
    layout.supervisor_status.write_text(garbled)
    assert report(tmp_path, _silent)["state"] == "down"
    with pytest.raises(ServiceError, match=r"garbled.*--site"):
        up(tmp_path, None, None)
    layout.service_json.write_text(garbled)
    ended = down(tmp_path)
    assert ended.outcome is Outcome.NOTHING_RAN
    assert "service.json.garbled" in ended.note
    assert not layout.service_json.exists()


def test_a_record_of_any_version_is_read_and_what_is_more_is_kept(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    record = record_of(site(), "local", tmp_path / "models.yaml", "192.0.2.1")
    whole = record.model_dump(mode="json")
    for name in whole:
        earlier = {key: value for key, value in whole.items() if key != name}
        for document in (earlier, {**earlier, name: ["another type"]}):
            layout.service_json.write_text(json.dumps(document))
            found = read_record(layout)
            assert found is not None
            assert not found.contradicts(record)
            assert report(tmp_path, _silent)["state"] == "down"
            assert down(tmp_path).outcome is Outcome.NOTHING_RAN
    layout.service_json.write_text(json.dumps({**whole, "later": [1]}))
    later = read_record(layout)
    assert later is not None
    assert later.url == record.url
    write_record(layout, later)
    assert json.loads(layout.service_json.read_text())["later"] == [1]
    assert ServiceRecord.model_validate({"port": True}).port == 0


@pytest.mark.parametrize(
    "garbled", [*GARBLED, '{"parts": []}', '{"parts": {"edge": 3}}', '{"parts": {"edge": {"phase": "odd"}}}']
)
def test_a_garbled_status_of_the_supervisor_hides_nothing(tmp_path: Path, garbled: str) -> None:
    layout = Layout(tmp_path)
    layout.run.mkdir(mode=0o700)
    write_record(layout, record_of(site(), "local", tmp_path / "models.yaml", "192.0.2.1"))
    layout.supervisor_status.write_text(garbled)
    assert report(tmp_path, _silent)["state"] == "down"
    assert read_status(layout).part("edge").phase is Phase.DOWN


def test_a_catalog_survives_its_document() -> None:
    entries = {
        "a": {"source": "org/a", "memory_gib": 1.5, "keep_alive": "10m", "aliases": ["b"], "pinned": True},
        "c": {"source": "/w", "memory_gib": 2, "engine": "command", "command": ["x", "{port}"], "env": {"K": "v"}},
    }
    catalog = parse_catalog({"models": entries}, "test")
    document = json.loads(json.dumps(catalog_document(catalog)))
    assert parse_catalog(document, "again") == catalog


def _silent(layout: Layout) -> dict[str, object]:
    raise GatewayUnreachable("nobody answers")


def test_status_does_not_believe_notes_of_the_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    layout = Layout(tmp_path / "state")
    layout.state.mkdir()
    layout.run.mkdir()
    gone = Mark(2**22 - 3, 1.0)
    record = record_of(site(), "local", tmp_path / "models.yaml", "192.0.2.1")
    write_record(layout, record.model_copy(update={"supervisor": gone}))
    part = Part(Phase.RUNNING, gone)
    layout.supervisor_status.write_text(
        state_text(supervisor_state(Plan(part, part, part), "running", gone, 0.0, record))
    )

    found = report(layout.state, ask=_silent)

    assert found["state"] == "down"
    assert found["parts"]["edge"]["state"] == found["parts"]["supervisor"]["state"] == "dead"


def test_status_shows_what_lives_when_the_supervisor_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    layout = Layout(tmp_path / "state")
    layout.state.mkdir()
    layout.run.mkdir()
    living = mark(os.getpid())
    assert living is not None
    record = record_of(site(), "local", tmp_path / "models.yaml", "192.0.2.1")
    write_record(layout, record.model_copy(update={"supervisor": Mark(2**22 - 3, 1.0)}))
    plan = Plan(Part(), Part(Phase.RUNNING, living), Part(Phase.RUNNING))
    layout.supervisor_status.write_text(state_text(supervisor_state(plan, "running", living, 0.0, record)))

    found = report(layout.state, ask=_silent)

    assert found["state"] == "degraded"
    head = found["parts"]["head"]
    assert (head["state"], head["pid"], head["restarts"]) == ("running", os.getpid(), 0)
    assert found["gateway_error"] == "nobody answers"


def test_a_status_without_parts_is_down(tmp_path: Path) -> None:
    assert report(tmp_path / "nowhere", ask=_silent)["state"] == "down"
    assert read_status(Layout(tmp_path / "nowhere")).part("edge").mark is None
    assert read_status(Layout(tmp_path / "nowhere")).part("edge").phase is Phase.DOWN


def test_logs_are_found_by_name_and_read_from_the_end(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.engine_logs.mkdir(parents=True)
    (layout.engine_logs / "alpha-1-2.log").write_text("".join(f"line {n}\n" for n in range(100)))
    layout.edge_log.write_text("")
    assert set(find_logs(layout)) == {"engine:alpha-1-2", "edge"}
    assert last_lines(log_named(layout, "engine:alpha"), 2) == ["line 98", "line 99"]
    assert last_lines(tmp_path / "none", 5) == []
    with pytest.raises(NotFound, match="engine:alpha-1-2"):
        log_named(layout, "nope")


def test_the_gateways_own_logs_go_by_the_names_of_its_parts_and_serves_by_serves(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.block_scripts.mkdir(parents=True)
    serve = layout.ray_temp / "session_latest" / "logs" / "serve"
    serve.mkdir(parents=True)
    layout.logs.mkdir()
    files = {
        "controller": layout.logs / "controller.log",
        "ingress": layout.logs / "ingress.log",
        "block:gw-cpu-01234567": layout.logs / "block-gw-cpu-01234567.log",
        "job:gw-cpu-01234567.1.sh.err": layout.block_scripts / "gw-cpu-01234567.1.sh.err",
        "serve:replica-controller": serve / "replica_gateway_controller_abc123.log",
        "serve:replica-ingress": serve / "replica_gateway_ingress_abc123.log",
        "serve:proxy": serve / "proxy_10.0.0.1.log",
    }
    for name, path in files.items():
        path.write_text(f"said by {name}\n")
    assert set(find_logs(layout)) == set(files)
    for name in files:
        assert last_lines(log_named(layout, name), 1) == [f"said by {name}"]
    assert last_lines(log_named(layout, "block:gw-cpu"), 1) == ["said by block:gw-cpu-01234567"]
