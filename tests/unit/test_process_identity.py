"""Is it still the process that we started?"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from gateway_plugin import processes as identity
from gateway_plugin.processes import Mark, age_s, alive, has_its_pid, mark, mark_of_dead, parse_stat, read_mark

BOOT = "0e1f3c52-boot"
BTIME = 1_700_000_000
TICKS = os.sysconf("SC_CLK_TCK")


class Machine:
    """A ``/proc`` of our own, with one process, 7."""

    def __init__(self, proc: Path) -> None:
        self.proc = proc
        (proc / "7").mkdir()
        (proc / "sys/kernel/random").mkdir(parents=True)
        (proc / "7/status").write_text(f"Name:\tsleep\nUid:\t{os.getuid()}\t0\t0\t0\n")
        self.process(start=12 * TICKS)
        self.boot(BOOT, BTIME)

    def process(self, start: int, state: str = "S") -> None:
        (self.proc / "7/stat").write_text(f"7 (a) b (c)) {state} 1 7 7 {'0 ' * 15}{start} 99 1\n")

    def boot(self, boot: str, btime: int) -> None:
        (self.proc / "sys/kernel/random/boot_id").write_text(f"{boot}\n")
        self.set_clock(btime)

    def set_clock(self, btime: int) -> None:
        """The kernel counts the boot's time from the wall clock."""
        (self.proc / "stat").write_text(f"cpu 1 2 3\nbtime {btime}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(identity, "_PROC", tmp_path)
    return Machine(tmp_path)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen(["sleep", "60"])
    yield started
    started.kill()
    started.wait()


def found(pid: int) -> Mark:
    known = mark(pid)
    assert known is not None
    return known


def test_a_programs_name_may_hold_blanks_and_brackets() -> None:
    line = "7 (a) b (c)) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 20 0 12345 99 1"
    assert parse_stat(line) == ("S", 1, 20, 12345, "a) b (c)")


def test_a_mark_says_when_the_process_started_as_psutil_does() -> None:
    assert found(os.getpid()).started == pytest.approx(psutil.Process().create_time(), abs=1.0)


@pytest.mark.parametrize("step_s", [3, 3600, -3600])
def test_a_process_stays_the_same_when_the_clock_is_set(machine: Machine, step_s: int) -> None:
    known = found(7)
    assert known.started == BTIME + 12
    machine.set_clock(BTIME + step_s)
    assert alive(known)
    assert found(7) == known


def test_a_pid_is_given_out_again(machine: Machine) -> None:
    known = found(7)
    machine.process(start=12 * TICKS + 1)
    assert has_its_pid(known) is False
    assert not alive(known)


def test_after_a_reboot_the_same_pid_and_ticks_are_another_process(machine: Machine) -> None:
    known = found(7)
    machine.boot("another-boot", BTIME)
    assert has_its_pid(known) is False
    assert not alive(known)


@pytest.mark.parametrize(("off_s", "same"), [(0.0, True), (2.0, True), (-2.0, True), (2.5, False), (-60.0, False)])
def test_a_mark_of_an_earlier_version_is_known_by_the_wall_clock(machine: Machine, off_s: float, same: bool) -> None:
    known = read_mark({"pid": 7, "started": BTIME + 12 + off_s})
    assert alive(known) is same


def test_where_the_kernel_tells_no_boot_id_the_wall_clock_has_to_do(machine: Machine) -> None:
    known = found(7)
    (machine.proc / "sys/kernel/random/boot_id").unlink()
    assert alive(known)
    assert alive(found(7))
    assert found(7).boot == ""
    machine.process(start=60 * TICKS)
    assert not alive(known)


def test_a_zombie_has_its_pid_and_does_not_live(machine: Machine) -> None:
    known = found(7)
    machine.process(start=12 * TICKS, state="Z")
    assert not alive(known)
    assert mark(7) is None
    assert mark(7, dead_too=True) == known
    assert has_its_pid(known) is True


def test_nobody_has_the_pid_of_one_that_is_gone(machine: Machine) -> None:
    known = found(7)
    (machine.proc / "7/stat").unlink()
    assert has_its_pid(known) is None
    assert not alive(known)
    assert mark(7, dead_too=True) is None


def test_one_that_was_gone_when_it_was_marked_is_nobody_who_has_its_pid(machine: Machine) -> None:
    assert has_its_pid(mark_of_dead(7)) is False
    assert not alive(mark_of_dead(7))


def test_another_users_process_is_not_ours(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert not alive(found(7))
    monkeypatch.setattr(os, "getuid", lambda: 0)  # to root all are
    assert alive(found(7))


@pytest.mark.process
def test_an_age_does_not_change_with_the_clock(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    known = found(child.pid)
    assert 0.0 <= age_s(known) < 30
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert 0.0 <= age_s(known) < 30
    assert age_s(Mark(known.pid, now)) == 3600  # of an earlier version
    assert age_s(replace(known, boot="another", started=now + 7200)) == 0.0


@pytest.mark.parametrize("document", [None, 3, {}, {"pid": "7", "started": 1}, {"pid": 7}, {"pid": -1, "started": 1.0}])
def test_a_damaged_mark_is_none(document: object) -> None:
    assert read_mark(document) is None


def test_a_mark_survives_its_document() -> None:
    known = Mark(7, 1.5, 1200, BOOT)
    assert read_mark(asdict(known)) == known
    again = read_mark(asdict(known))
    assert again is not None
    assert again.started == known.started
    assert read_mark({"pid": 7, "started": 1.5}) == Mark(7, 1.5)
