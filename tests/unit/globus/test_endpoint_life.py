"""One endpoint, commands that run at once or on two machines, and what ``configure`` knows of the last time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from gateway_plugin.errors import ConfigError, NotFound, ServiceError
from gateway_plugin.globus.endpoint.endpoints import Endpoints
from gateway_plugin.globus.endpoint.store import EndpointRecord, Options, Records
from gateway_plugin.paths import Layout
from gateway_plugin.processes import Mark, alive, mark
from tests.support.globus import fake_sdk

HERE = socket.gethostname()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    (tmp_path / "state/endpoints/globus/gateway").mkdir(parents=True)
    return Layout(tmp_path / "state")


@pytest.fixture
def sleeper() -> Iterator[Mark]:
    """A process that runs."""
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as process:
        found = mark(process.pid)
        assert found is not None
        yield found
        process.kill()


def configured(layout: Layout, process: Mark | None = None, host: str | None = None, **more: object) -> Records:
    """As ``configure`` leaves it; the environment has the stand-ins."""
    venv = layout.state.parent / "venv"
    fields = {"id": "i", "venv": venv, "functions": ("f",), "answers": "/nowhere/a", **more}
    records = Records(layout.state / "endpoints")
    records.write("gateway", EndpointRecord.model_validate({**fields, "process": process, "host": host}))
    return records


def gateway(layout: Layout, *words: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "gateway_plugin.cli.main", "--state", str(layout.state), "endpoint", *words]
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=fake_sdk.environment(layout.state.parent),
        start_new_session=True,
    )


def pid_file(layout: Layout) -> Path:
    return layout.state / "endpoints/globus/gateway/daemon.pid"


# --- two machines, one state folder ---
@pytest.mark.process
@pytest.mark.parametrize("command", ["start", "restart", "stop", "delete"])
def test_what_another_machine_runs_is_left_alone(layout: Layout, command: str) -> None:
    configured(layout, Mark(1, 1.0), "login-elsewhere")
    pid_file(layout).touch()
    with gateway(layout, command, *(["--yes"] if command == "delete" else [])) as child:
        words = child.communicate(timeout=30)[1]
    assert child.returncode != 0
    assert "login-elsewhere" in words
    assert pid_file(layout).exists()
    found = Records(layout.state / "endpoints").known("gateway")
    assert found.host == "login-elsewhere"
    assert found.process is not None


def test_status_does_not_call_it_stopped(layout: Layout) -> None:
    configured(layout, Mark(1, 1.0), "login-elsewhere")
    found = Endpoints(layout).status("gateway")
    assert (found.state, found.pid, found.host) == ("unknown", None, "login-elsewhere")
    assert found.note is not None
    assert "login-elsewhere" in found.note


@pytest.mark.process
def test_a_machine_that_is_gone_for_good_is_forgotten(layout: Layout, sleeper: Mark) -> None:
    records = configured(layout, sleeper, "login-elsewhere")
    pid_file(layout).touch()
    assert Endpoints(layout).stop("gateway", host_is_gone=True)
    assert records.known("gateway").process is None
    assert not pid_file(layout).exists(), "the next process would refuse to start"
    assert alive(sleeper), "a process here that happens to have its PID"


# --- start and stop here ---
@pytest.mark.process
def test_two_starts_at_once_make_one_process(layout: Layout) -> None:
    fake_sdk.make(layout.state.parent)
    globus = layout.state / "endpoints/globus"
    (globus / "token").touch()
    records = configured(layout)
    with records.locked():
        first, second = gateway(layout, "start", "--json"), gateway(layout, "start", "--json")
        for child in (first, second):
            assert child.stderr is not None
            assert "printed by the SDK" in child.stderr.readline(), "both have got so far"
        assert not (globus / "starts").exists()
    try:
        said = [child.communicate(timeout=60) for child in (first, second)]
        assert [first.returncode, second.returncode] == [0, 0], said
        assert (globus / "starts").read_text() == "gateway\n"
        assert len({json.loads(out)["pid"] for out, _ in said}) == 1
        assert records.known("gateway").host == HERE
    finally:
        assert Endpoints(layout).stop("gateway")
    assert not pid_file(layout).exists()


@pytest.mark.process
def test_one_that_was_killed_here_starts_again(layout: Layout) -> None:
    fake_sdk.make(layout.state.parent)
    (layout.state / "endpoints/globus/token").touch()
    configured(layout, Mark(2**22 + 1, 1.0), HERE)  # above any PID
    pid_file(layout).touch()
    with gateway(layout, "start") as child:
        assert child.communicate(timeout=60)[1] is not None
    assert child.returncode == 0
    assert Endpoints(layout).stop("gateway")


# --- configure ---
def test_options_that_are_not_given_again_stay() -> None:
    before = Options(url="https://a:1", workers=8, ca=Path("/ca.pem"), multi_user=True)
    assert Options(workers=2, contact="a@b.c").over(before) == Options(
        url="https://a:1", workers=2, ca=Path("/ca.pem"), multi_user=True, contact="a@b.c"
    )


def test_options_survive_the_record(layout: Layout) -> None:
    options = Options(url="https://a:1", ca=Path("/ca.pem"), heartbeat_s=5.0)
    records = configured(layout, Mark(7, 1.5), HERE, options=options)
    found = records.known("gateway")
    assert found.options == options
    assert found.process == Mark(7, 1.5)


def test_a_damaged_record_is_named_before_anything_is_made(layout: Layout) -> None:
    path = layout.state / "endpoints/gateway.endpoint"
    path.write_text("{")
    before = sorted(layout.state.rglob("*"))
    endpoints = Endpoints(layout)
    with pytest.raises(ServiceError, match="remove the file") as caught:
        endpoints.configure("gateway", Options(url="https://a:1"), lambda *_: None)
    assert str(path) in caught.value.message
    with pytest.raises(ServiceError, match="remove the file"):
        endpoints.start("gateway", lambda *_: None)
    assert sorted(layout.state.rglob("*")) == before
    path.unlink()
    with pytest.raises(NotFound):
        endpoints.start("gateway", lambda *_: None)


@pytest.mark.process
def test_the_environment_is_not_made_anew_under_a_running_endpoint(layout: Layout, sleeper: Mark) -> None:
    options, place = Options(url="https://a:1"), layout.state / "endpoints"
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        if os.getuid() == 0:
            place = Path(folder) / "shared"
            options = Options(
                url="https://a:1", multi_user=True, identity_mapping=Path("/m"), contact="a@b.c", shared_folder=place
            )
        configured(layout, sleeper, HERE, venv=place / "venv")
        with pytest.raises(ConfigError, match="gateway endpoint stop gateway"):
            Endpoints(layout).configure("another", options, lambda *_: None)
        assert not (place / "venv").exists()


# --- multi-user: nothing that others can change ---
@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of root's that everybody reaches, as /opt is."""
    if os.getuid() != 0:
        pytest.skip("a multi-user endpoint is root's")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def of_alice(path: Path) -> Path:
    """A file that another user may change."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.chown(path, 65534, 65534)
    return path


def multi_user(place: Path, **more: object) -> Options:
    mapping = place / "map.json"
    mapping.write_text("[]")
    told = {"url": "https://a:1", "multi_user": True, "identity_mapping": mapping, "contact": "a@b.c"}
    return Options.model_validate(told | {"shared_folder": place / "shared"} | more)


def tracing_venv(place: Path) -> Path:
    """An environment that leaves a trace when anything of it runs."""
    (place / "venv/bin").mkdir(parents=True)
    for name in ("python", "globus-compute-endpoint"):
        (place / "venv/bin" / name).write_text(f"#!/bin/sh\ntouch {place / 'ran'}\n")
        (place / "venv/bin" / name).chmod(0o755)
    return place / "venv"


@pytest.mark.parametrize("option", ["identity_mapping", "ca", "shared_folder", "venv"])
def test_configure_refuses_what_others_than_root_can_change(layout: Layout, place: Path, option: str) -> None:
    venv = tracing_venv(place)
    offending = of_alice(venv / "bin/python") if option == "venv" else of_alice(place / "alice")
    if option == "shared_folder":
        offending.unlink()
        offending.mkdir()
        os.chown(offending, 65534, 65534)
    given = {"venv": venv} | ({} if option == "venv" else {option: offending})
    with pytest.raises(ConfigError) as caught:
        Endpoints(layout).configure("gateway", multi_user(place, **given), lambda *_: None)
    assert caught.value.message.startswith(str(offending))
    assert f"--{option.replace('_', '-')}" in caught.value.message
    assert not (place / "ran").exists()


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("start", "identity_mapping"), ("restart", "identity_mapping"), ("start", "ca"), ("restart", "ca"),
        ("start", "venv"), ("restart", "venv"), ("ask_status", "venv"), ("delete", "venv"),
    ],
)  # fmt: skip
def test_what_others_can_change_since_is_refused_before_it_runs(
    layout: Layout, place: Path, command: str, option: str
) -> None:
    venv, mapping, ca = tracing_venv(place), place / "map.json", place / "ca.pem"
    ca.touch()
    configured(layout, venv=venv, options=multi_user(place, ca=ca))
    offending = of_alice({"identity_mapping": mapping, "ca": ca, "venv": venv / "bin/python"}[option])
    with pytest.raises(ConfigError, match=rf"^{offending}\b.* is nobody's.*--{option.replace('_', '-')}"):
        if "start" in command:
            Endpoints(layout).start("gateway", lambda *_: None, stop_first=command == "restart")
        else:
            getattr(Endpoints(layout), command)("gateway")
    assert not (place / "ran").exists()


def test_the_gateways_own_authority_is_taken_where_its_door_has_a_certificate_of_it(layout: Layout) -> None:
    endpoints = Endpoints(layout)
    layout.node.mkdir()
    layout.ca.touch()
    for url, expected in (
        ("https://127.0.0.1:8180", str(layout.ca)),
        ("https://gateway.example.org:8180", None),
    ):
        assert endpoints._settings("gateway", Options(url=url)).ca == expected
    assert (
        endpoints._settings("gateway", Options(url="https://127.0.0.1:8180", ca=Path("/other.pem"))).ca == "/other.pem"
    )
    layout.ca.unlink()
    assert endpoints._settings("gateway", Options(url="https://127.0.0.1:8180")).ca is None
    (layout.state / "service.json").write_text(json.dumps({"url": "https://127.0.0.1:8180"}))
    layout.admin_key.write_text("k")
    layout.ca.touch()
    assert endpoints._settings("gateway", Options()).ca == str(layout.ca)
    with pytest.raises(ConfigError, match="plain HTTP"):
        endpoints._settings("gateway", Options(url="http://127.0.0.1:8180"))


def test_answers_lie_in_the_state_folder_or_below_each_mapped_users_own(layout: Layout, tmp_path: Path) -> None:
    endpoints = Endpoints(layout)
    own = endpoints._settings("gateway", Options(url="https://a:1")).answers
    assert Path(own).is_relative_to(layout.state)
    mapped = Options(url="https://a:1", multi_user=True, identity_mapping=Path("/m"), contact="a@b.c")
    assert not Path(endpoints._settings("gateway", mapped).answers).is_absolute()


def test_stop_removes_what_was_kept_and_restart_leaves_it(layout: Layout) -> None:
    answers = str(layout.state / "endpoints/answers/gateway")
    folder = Path(f"{answers}-{os.getuid()}")
    kept = folder / f"{1:064x}.jsonl"
    folder.mkdir(parents=True)
    kept.touch()
    configured(layout, answers=answers)
    endpoints = Endpoints(layout)
    assert not endpoints.stop("gateway", keep_answers=True)
    assert kept.exists()
    assert not endpoints.stop("gateway")
    assert not kept.exists()


@pytest.mark.process
def test_an_endpoint_recorded_by_an_earlier_version_is_known(layout: Layout, sleeper: Mark) -> None:
    records = configured(layout, sleeper, HERE)
    path = layout.state / "endpoints/gateway.endpoint"
    document = json.loads(path.read_text())
    assert document["process"] == asdict(sleeper)
    document["process"] = {"pid": sleeper.pid, "started": sleeper.started}
    path.write_text(json.dumps(document))
    assert alive(records.known("gateway").process)
