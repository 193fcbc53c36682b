"""Real processes: what a block ends last and what it must not touch."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from gateway_plugin.blocks import cleanup
from gateway_plugin.blocks.cleanup import clean_up
from gateway_plugin.engine_records import end_engines, read_records
from gateway_plugin.processes import BLOCK_MARK, Mark, alive, carries_mark, end, mark, uses_folder
from tests.support.agents import eventually, own_block
from tests.support.clocks import set_clock

pytestmark = pytest.mark.process

MINE, OTHER = own_block("a"), own_block("b")

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(300)"
FAMILY = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(300)
"""


class Engines:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(
        self, block: str, code: str = "print(flush=True); import time; time.sleep(300)"
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            start_new_session=True,
            stdout=subprocess.PIPE,
            env={**os.environ, BLOCK_MARK: block},
        )
        self.processes.append(process)
        return process

    def record(self, name: str, block: str, leader: Mark) -> Path:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps({"engine": name, "block": block, **asdict(leader), "port": 1}))
        return path


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Engines]:
    engines = Engines(tmp_path)
    yield engines
    for process in engines.processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        finally:
            process.communicate()


def marked(process: subprocess.Popen[bytes]) -> Mark:
    found = mark(process.pid)
    assert found is not None
    return found


def said(process: subprocess.Popen[bytes]) -> bytes:
    """Its next line: it is up."""
    assert process.stdout is not None
    return process.stdout.readline()


def gone(pid: int) -> bool:
    return mark(pid) is None


def test_it_ends_a_whole_engine_and_only_its_own_block_s(engines: Engines) -> None:
    mine, theirs = engines.start(MINE, FAMILY), engines.start(OTHER)
    child = int(said(mine))
    record = engines.record("mine", MINE, marked(mine))
    other = engines.record("theirs", OTHER, marked(theirs))
    assert end_engines(engines.folder, MINE, grace_s=0.3) == ()
    assert gone(mine.pid)
    assert gone(child)  # it ignored the first asking
    assert not gone(theirs.pid)
    assert (record.exists(), other.exists()) == (False, True)


def test_an_engine_whose_leader_died_is_still_ended(engines: Engines) -> None:
    leader = engines.start(MINE, FAMILY)
    child = int(said(leader))
    engines.record("e", MINE, marked(leader))
    leader.kill()
    leader.wait()
    assert not gone(child)
    assert end_engines(engines.folder, MINE, grace_s=0) == ()
    assert gone(child)


def test_an_engine_whose_leader_is_dead_but_not_reaped_is_still_ended(engines: Engines) -> None:
    """Its agent was killed first: for a while the leader is a zombie, and its children hold the memory."""
    leader = engines.start(MINE, FAMILY)
    child = int(said(leader))
    record = engines.record("e", MINE, marked(leader))
    leader.kill()
    assert eventually(lambda: psutil.Process(leader.pid).status() == psutil.STATUS_ZOMBIE)
    assert not gone(child)
    assert end_engines(engines.folder, MINE, grace_s=0) == ()
    assert gone(child)
    assert not record.exists()


def test_an_engine_whose_leader_died_is_known_by_its_log(engines: Engines) -> None:
    """vLLM's core overwrites its environment with its title: no mark is left on it."""
    log = engines.folder / "e.log"
    child_code = "import time; time.sleep(300)"
    leader_code = f"import subprocess, sys, time; c = subprocess.Popen([sys.executable, '-c', {child_code!r}])"
    with log.open("wb") as output:
        leader = subprocess.Popen(
            [sys.executable, "-c", f"{leader_code}; print(c.pid, flush=True); time.sleep(300)"],
            start_new_session=True,
            stdout=output,
            stderr=output,
        )
    engines.processes.append(leader)
    assert eventually(lambda: log.read_text().endswith("\n"))
    child = int(log.read_text())
    record = engines.record("e", MINE, marked(leader))
    record.write_text(json.dumps({**json.loads(record.read_text()), "log": str(log)}))
    leader.kill()
    leader.wait()
    assert not carries_mark(child, MINE)
    assert end_engines(engines.folder, MINE, grace_s=0) == ()
    assert gone(child)


@pytest.mark.parametrize("version", ["this", "earlier"])
def test_a_pid_with_another_start_is_never_touched(engines: Engines, version: str) -> None:
    stranger = engines.start(MINE)
    known = marked(stranger)
    other = replace(known, ticks=known.ticks - 1) if version == "this" else Mark(known.pid, known.started - 60)
    record = engines.record("e", MINE, other)
    assert end_engines(engines.folder, MINE, grace_s=0) == ()
    assert not gone(stranger.pid)
    assert not record.exists()


def test_an_engine_recorded_by_an_earlier_version_is_ended(engines: Engines) -> None:
    mine = engines.start(MINE)
    record = engines.record("e", MINE, marked(mine))
    record.write_text(json.dumps({"block": MINE, "pid": mine.pid, "started": psutil.Process(mine.pid).create_time()}))
    assert end_engines(engines.folder, MINE, grace_s=1) == ()
    assert gone(mine.pid)
    assert not record.exists()


@pytest.mark.parametrize("step_s", [3, 3600, -3600])
def test_an_engine_is_ended_after_the_clock_was_set(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, step_s: int
) -> None:
    mine = engines.start(MINE)
    record = engines.record("e", MINE, marked(mine))
    set_clock(monkeypatch, step_s)
    assert end_engines(engines.folder, MINE, grace_s=1) == ()
    assert gone(mine.pid)
    assert not record.exists()


def test_a_broken_record_saves_nobody(engines: Engines, capfd: pytest.CaptureFixture[str]) -> None:
    mine = engines.start(MINE)
    (engines.folder / "a.json").write_text("{")
    (engines.folder / "b.json").write_text(json.dumps({"block": MINE}))
    engines.record("c", MINE, marked(mine))
    assert clean_up(engines.folder, MINE, engines.folder / "none")
    assert gone(mine.pid)
    assert capfd.readouterr().err.count("not an engine record") >= 2
    assert [record.path.name for record in read_records(engines.folder)] == []


def test_what_carries_the_block_s_mark_goes_too(engines: Engines) -> None:
    orphan, other = engines.start(MINE), engines.start(OTHER)
    said(orphan)
    said(other)
    assert clean_up(engines.folder, MINE, engines.folder / "none")
    assert gone(orphan.pid)
    assert not gone(other.pid)


def test_an_error_with_its_engines_does_not_save_the_rest(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The caller's exit code and what it removes next depend on it: it raises nothing."""

    def fails(*_: object) -> tuple[str, ...]:
        raise OSError(errno.EIO, "Input/output error")

    orphan = engines.start(MINE)
    said(orphan)
    monkeypatch.setattr(cleanup, "end_engines", fails)
    assert not clean_up(engines.folder, MINE, engines.folder / "none")
    assert gone(orphan.pid)
    assert "Input/output error" in capfd.readouterr().err
    monkeypatch.setattr(cleanup, "block_processes", fails)
    assert not clean_up(engines.folder, MINE, engines.folder / "none")


def test_ours_by_start_time_mark_and_folder(engines: Engines, tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    code = f"f = open({str(folder / 'x')!r}, 'w'); print(flush=True); import time; time.sleep(300)"
    process = engines.start(MINE, code)
    said(process)
    ours = marked(process)
    assert carries_mark(ours.pid, MINE)
    assert not carries_mark(ours.pid, MINE[:-1])
    assert uses_folder(ours.pid, folder)
    assert not uses_folder(ours.pid, tmp_path / "ra")
    assert alive(ours)
    assert alive(Mark(ours.pid, ours.started))  # of an earlier version
    assert not alive(Mark(ours.pid, ours.started + 10))
    assert not alive(None)
    assert end(lambda: [ours], grace_s=0) == ()
