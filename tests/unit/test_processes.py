"""Finding and ending the gateway's processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from gateway_plugin.processes import Mark, alive, arguments, descendants, end, find_own, listed_children, mark

pytestmark = pytest.mark.process


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "a-word", "of ours"])
    while arguments(child.pid)[-1:] != ("of ours",):
        assert child.poll() is None  # between fork and exec it still has our own command line
    yield child
    child.kill()
    child.wait()


def test_another_process_with_the_same_pid_is_not_ended(sleeper: subprocess.Popen[bytes]) -> None:
    known = mark(sleeper.pid)
    assert known is not None
    assert end([replace(known, ticks=known.ticks - 1)], grace_s=0.0) == ()
    assert end([Mark(known.pid, known.started - 60)], grace_s=0.0) == ()
    assert sleeper.poll() is None
    assert end([Mark(known.pid, known.started)], grace_s=5.0) == ()  # as an earlier version recorded it
    assert sleeper.wait(5) == -15


def test_a_zombie_is_not_alive(sleeper: subprocess.Popen[bytes]) -> None:
    known = mark(sleeper.pid)
    assert end([known] if known else [], grace_s=5.0) == ()
    assert not alive(known)
    assert psutil.Process(sleeper.pid).status() == psutil.STATUS_ZOMBIE  # nobody has collected it yet


def test_what_ignores_sigterm_is_killed() -> None:
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        known = mark(child.pid)
        assert known is not None
        assert end([known], grace_s=0.1) == ()
        assert child.wait() == -9


def test_processes_are_found_by_whole_arguments_in_a_row(sleeper: subprocess.Popen[bytes]) -> None:
    assert sleeper.pid in [known.pid for known in find_own(("a-word", "of ours"))]
    assert find_own(("a-word", "of")) == ()
    assert find_own(("of ours", "a-word")) == ()
    assert arguments(sleeper.pid)[-1] == "of ours"


def test_descendants_are_found(sleeper: subprocess.Popen[bytes]) -> None:
    assert sleeper.pid in [known.pid for known in descendants(os.getpid())]
    assert sleeper.pid in [known.pid for known in listed_children(os.getpid())]
    assert listed_children(sleeper.pid) == ()


@pytest.mark.skipif(os.getuid() != 0, reason="to become another user needs root")
def test_what_roots_process_started_as_another_user_is_ended_too() -> None:
    with subprocess.Popen(["/bin/sleep", "600"], user=65534, group=65534, extra_groups=[]) as child:
        (found,) = (known for known in descendants(os.getpid()) if known.pid == child.pid)
        assert alive(found)
        assert end([found], grace_s=5.0) == ()
        assert child.wait(5) == -15
