"""Processes of a comparison end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gateway_plugin.errors import ConfigError
from serve.simulate.workers import each


def _double(number: int) -> int:
    return 2 * number


def _end(number: int) -> int:
    if number:
        os._exit(1)
    return number


def test_one_at_a_time_runs_here_and_in_order() -> None:
    assert list(each(_double, [3, 1, 2], jobs=1)) == [(3, 6), (1, 2), (2, 4)]


@pytest.mark.process
def test_several_run_in_processes_and_an_early_end_of_one_is_an_error() -> None:
    assert sorted(each(_double, [3, 1, 2], jobs=2)) == [(1, 2), (2, 4), (3, 6)]
    with pytest.raises(ConfigError, match="process ended early"):
        list(each(_end, [1, 1], jobs=2))


@pytest.mark.process
def test_an_interrupt_ends_the_processes_and_leaves_no_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve.simulate", "--trace", "llmux-bursty", "--trace", "zipf-50", "--jobs", "2"]
    out = tmp_path / "out"
    with subprocess.Popen(
        [*command, "--policy", "fifo", "--policy", "gateway", "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as ran:  # fmt: skip
        assert ran.stderr is not None
        assert "llmux-bursty" in ran.stderr.readline()  # the first one is done, others run
        children = psutil.Process(ran.pid).children()
        assert len(children) == 2
        os.killpg(ran.pid, signal.SIGINT)  # as a terminal does
        _, said = ran.communicate(timeout=30)

    assert ran.returncode != 0
    assert "Traceback" not in said
    assert not any(child.is_running() for child in children)
    assert not out.exists()
