"""What a node remembers of its engines."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gateway_plugin.paths import Layout
from gateway_plugin.processes import Mark, alive, group_members, mark
from serve.agent import records
from serve.agent.records import EngineRecord


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    made = Layout(tmp_path / "state")
    made.make()
    return made


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield started
    started.kill()
    started.wait()


def record(engine: str = "e1", pid: int = 4_000_000, started: float = 1000.0) -> EngineRecord:
    return EngineRecord(
        engine=engine,
        model="org/m",
        task="generate",
        node="n1",
        block="b1",
        pid=pid,
        started=started,
        host="127.0.0.1",
        port=4000,
        epoch=3,
        gpus=(0, 2),
        memory_mib=512,
        log="/l",
        key="s3cret",
    )


def test_a_record_comes_back_as_it_was(layout: Layout) -> None:
    ready = record().model_copy(update={"ready": True, "loaded_s": 23.5})
    records.write(layout, record())
    records.write(layout, ready)
    assert tuple(records.read_all(layout)) == (ready,)
    records.remove(layout, "e1")
    records.remove(layout, "e1")
    assert tuple(records.read_all(layout)) == ()


def test_a_record_is_nobody_elses_business(layout: Layout) -> None:
    records.write(layout, record())
    assert stat.S_IMODE(records.record_path(layout, "e1").stat().st_mode) == 0o600
    assert "s3cret" not in repr(record())


GARBLED = {"a": "", "b": "{", "c": "[]", "d": '{"engine": "x", "gpus": []}', "e": '{"gpus": 3}', "f": "\x00"}


def test_a_garbled_record_of_nothing_that_lives_is_removed(layout: Layout) -> None:
    for name, text in GARBLED.items():
        (layout.engine_records / f"{name}.json").write_text(text)
    records.write(layout, record())
    assert [found.engine for found in records.read_all(layout)] == ["e1"]
    assert len(records.garbled(layout)) == len(GARBLED)
    records.end_unrecorded(layout, "b1")
    assert [path.stem for path in layout.engine_records.iterdir()] == ["e1"]


@pytest.mark.process
def test_the_engine_of_a_garbled_record_is_ended_by_its_own_block(layout: Layout) -> None:
    (layout.engine_records / "e1.json").write_text("{")
    with (layout.engine_logs / "e1.log").open("wb") as log:
        engine = subprocess.Popen(["sleep", "60"], stdout=log, env={"RAY_CLOUD_INSTANCE_ID": "b1", "PATH": "/bin"})
    try:
        records.end_unrecorded(layout, "b2")
        assert engine.poll() is None
        assert len(records.garbled(layout)) == 1
        records.end_unrecorded(layout, "b1")
        assert engine.poll() is not None
        assert records.garbled(layout) == ()
    finally:
        engine.kill()
        engine.wait()


def test_a_record_of_a_later_version_is_read(layout: Layout) -> None:
    records.record_path(layout, "e1").write_text(json.dumps({**record().model_dump(mode="json"), "later": [1]}))
    (found,) = records.read_all(layout)
    assert (found.engine, found.port) == ("e1", 4000)
    records.write(layout, found)
    assert json.loads(records.record_path(layout, "e1").read_text())["later"] == [1]


def test_an_engines_name_does_not_leave_the_folder(layout: Layout) -> None:
    assert records.record_path(layout, "../../etc/x").parent == layout.engine_records


def marked(process: subprocess.Popen[bytes]) -> Mark:
    found = mark(process.pid)
    assert found is not None
    return found


@pytest.mark.process
def test_a_record_names_its_process(layout: Layout, process: subprocess.Popen[bytes]) -> None:
    known = marked(process)
    written = record(pid=known.pid, started=known.started).model_copy(update={"ticks": known.ticks, "boot": known.boot})
    records.write(layout, written)
    (found,) = records.read_all(layout)
    assert found.mark == known
    assert alive(found.mark)


@pytest.mark.process
def test_a_record_of_an_earlier_version_is_read(layout: Layout, process: subprocess.Popen[bytes]) -> None:
    """It has a start by the wall clock alone: what it names is adopted or ended all the same."""
    written = record(pid=process.pid, started=psutil.Process(process.pid).create_time() + 1.5).model_dump(mode="json")
    for later in ("ticks", "boot"):
        del written[later]
    records.record_path(layout, "e1").write_text(json.dumps(written))
    (found,) = records.read_all(layout)
    assert alive(found.mark)
    assert [known.pid for known in group_members(found.mark)] == [process.pid]


@pytest.mark.process
def test_a_record_that_cannot_be_completed_stays_as_it_was(
    layout: Layout, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gateway_plugin.state_file.write_private", full)
    known = marked(process)
    assert records.completed(layout, record(pid=process.pid, started=known.started)).mark == known
    assert "No space left" in caplog.text


@pytest.mark.process
def test_a_dead_leader_has_no_group(process: subprocess.Popen[bytes]) -> None:
    known = marked(process)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped
    assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    assert group_members(known) == ()


@pytest.mark.process
def test_a_group_outlives_its_leader() -> None:
    leader = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], start_new_session=True, stdout=subprocess.PIPE)
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    known = marked(leader)
    assert {one.pid for one in group_members(known)} == {leader.pid, child}
    leader.kill()
    leader.wait(10)
    try:
        assert [one.pid for one in group_members(known)] == [child]
    finally:
        os.kill(child, 9)
        leader.stdout.close()


@pytest.mark.process
def test_a_stranger_with_the_leaders_pid_has_no_group_of_ours(process: subprocess.Popen[bytes]) -> None:
    known = marked(process)
    assert group_members(dataclasses.replace(known, ticks=known.ticks - 1)) == ()
    assert group_members(Mark(process.pid, known.started - 60)) == ()
