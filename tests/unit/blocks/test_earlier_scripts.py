"""What a block's job calls that an earlier version wrote: ``gateway_plugin.blocks.leave`` and ``run_folder``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway_plugin.paths import Layout
from gateway_plugin.processes import BLOCK_MARK, mark
from tests.support.agents import own_block

pytestmark = pytest.mark.process

NAME = own_block()


def call(module: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", f"gateway_plugin.blocks.{module}", *options]
    return subprocess.run(argv, env={**os.environ, **environment}, text=True, capture_output=True, check=False)


def test_it_is_given_its_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state"
    done = call("run_folder", GATEWAY_STATE=str(state), GATEWAY_RUN_ROOT=str(tmp_path))
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    assert done.stdout == f"{Layout(state).run}\n"
    assert Layout(state).run.stat().st_mode & 0o777 == 0o700


def test_without_a_place_it_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = call("run_folder", GATEWAY_STATE=str(tmp_path / "state"), GATEWAY_RUN_ROOT=str(tmp_path / "file"))
    assert (done.returncode, done.stdout) == (73, "")
    assert done.stderr.count("\n") == 1


def test_it_ends_what_runs_in_the_block(tmp_path: Path) -> None:
    left = subprocess.Popen(["sleep", "300"], env={**os.environ, BLOCK_MARK: NAME}, start_new_session=True)
    try:
        done = call("leave", "--records", str(tmp_path), "--block", NAME, "--folder", str(tmp_path / "b-0123abcd"))
        assert (done.returncode, mark(left.pid)) == (0, None)
    finally:
        left.kill()
        left.wait()
