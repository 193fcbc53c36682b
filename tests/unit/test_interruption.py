"""A test run that is told to end: what its tests started is ended first, whoever is told and how often."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.gateways import ROOT, wait_for
from tests.support.interruption import AGAIN_S, Interruption

SLOW = """
import time
from pathlib import Path
import pytest

@pytest.fixture(scope="module")
def shared():
    Path("{name}.started").touch()
    yield
    Path("{name}.ending").touch()
    time.sleep(1.0)
    Path("{name}.ended").touch()

def test_one(shared):
    time.sleep(60)

def test_another(shared):
    time.sleep(60)
"""


@pytest.mark.process
def test_a_run_ends_after_its_workers_have_ended_what_their_tests_share(tmp_path: Path) -> None:
    """SIGTERM to the process that has the workers; then, while they clean up, Ctrl-C, which reaches all of them."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    names = ("one", "two")
    for name in names:
        (tmp_path / f"test_{name}.py").write_text(SLOW.format(name=name))

    def all_of(state: str) -> bool:
        return all((tmp_path / f"{name}.{state}").exists() for name in names)

    argv = (sys.executable, "-m", "pytest", "-p", "xdist.plugin", "-p", "no:cacheprovider", "--numprocesses=2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    run = subprocess.Popen(
        argv, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: all_of("started"), 30, "tests run in both workers")
        run.send_signal(signal.SIGTERM)
        wait_for(lambda: all_of("ending"), 10, "both workers clean up")
        os.killpg(run.pid, signal.SIGINT)
        said, _ = run.communicate(timeout=60)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
    assert all_of("ended"), said
    assert run.returncode == pytest.ExitCode.INTERRUPTED, said
    assert "the 2 workers end what their tests started" in said


def test_a_signal_is_passed_on_once_and_again_only_to_what_holds_up_the_end() -> None:
    now = 0.0
    told = Interruption(clock=lambda: now)
    with pytest.raises(KeyboardInterrupt):
        told(signal.SIGINT, None)
    now = AGAIN_S / 2
    told(signal.SIGTERM, None)
    now = AGAIN_S
    with pytest.raises(KeyboardInterrupt):
        told(signal.SIGINT, None)
    now, told.ending = 3 * AGAIN_S, True
    told(signal.SIGINT, None)
