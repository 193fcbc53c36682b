"""The block's real script under bash, with a stand-in for Python and Ray that does as each story says."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway_plugin.blocks.script import TOLD_TO_END, block_folder, block_log, block_script
from gateway_plugin.layout import Layout
from gateway_plugin.site import NodeType
from tests.support.queue import QueueProvider, Scheduler

NAME = "gw-a-0123abcd"

# Called as: -c PROGRAM HEAD | -m gateway_plugin.blocks.leave ... | -m ray.scripts.scripts start ...
PYTHON = """#!/bin/bash
echo "$@" >> "{calls}"
case "$*" in
  -c*) echo 127.0.0.1 ;;
  *ray.scripts.scripts*)
{ray}
  ;;
esac
"""
STARTS = 'touch "{folder}/ray_current_cluster"'


@pytest.fixture
def block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], subprocess.Popen[str]]:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    layout = Layout(tmp_path / "state")
    layout.make()
    raylet = tmp_path / "raylet"  # the script knows Ray's process by this name
    shutil.copy("/bin/sleep", raylet)
    python = tmp_path / "my python"

    def start(ray: str) -> subprocess.Popen[str]:
        folder = str(block_folder(layout.run, NAME))
        text = PYTHON.format(calls=tmp_path / "calls", ray=ray.format(raylet=raylet, folder=folder))
        python.write_text(text.replace("{folder}", folder))
        python.chmod(0o755)
        node_type = NodeType(name="a", provider=QueueProvider(Scheduler()), cpus=1, engine_memory_gib=1)
        script = block_script(NAME, node_type, layout, "127.0.0.1:1", str(python))
        return subprocess.Popen(["bash", "-c", script], text=True, start_new_session=True)

    return start


def calls(tmp_path: Path, what: str) -> int:
    path = tmp_path / "calls"
    return sum(what in line for line in path.read_text().splitlines()) if path.exists() else 0


def said(tmp_path: Path) -> str:
    return block_log(Layout(tmp_path / "state"), NAME).read_text()


def left_cleanly(tmp_path: Path) -> None:
    assert calls(tmp_path, "gateway_plugin.blocks.leave") == 1
    assert not block_folder(Layout(tmp_path / "state").run, NAME).exists()


def test_a_drained_node_leaves_though_ray_stays(tmp_path: Path, block: Callable[[str], subprocess.Popen[str]]) -> None:
    process = block("{raylet} 1 & " + STARTS + "; wait; exec sleep 300")
    assert process.wait(20) == 0
    assert "gave this node back" in said(tmp_path)
    left_cleanly(tmp_path)


def test_a_crashed_node_fails(tmp_path: Path, block: Callable[[str], subprocess.Popen[str]]) -> None:
    process = block("{raylet} 1 & " + STARTS + "; wait; exit 1")
    assert process.wait(20) == 1
    assert "ended with exit code 1" in said(tmp_path)
    assert calls(tmp_path, "ray.scripts.scripts") == 1
    left_cleanly(tmp_path)


def test_ray_that_does_not_start_is_started_once_more(
    tmp_path: Path, block: Callable[[str], subprocess.Popen[str]]
) -> None:
    assert block("exit 3").wait(20) == 3
    assert calls(tmp_path, "ray.scripts.scripts") == 2
    left_cleanly(tmp_path)


def test_a_node_that_dies_before_it_joined_was_not_given_back(
    tmp_path: Path, block: Callable[[str], subprocess.Popen[str]]
) -> None:
    assert block("{raylet} 0.7 & wait; exec sleep 300").wait(20) != 0
    assert calls(tmp_path, "ray.scripts.scripts") == 2
    left_cleanly(tmp_path)


def test_told_to_end_it_ends_ray_and_cleans_up(tmp_path: Path, block: Callable[[str], subprocess.Popen[str]]) -> None:
    process = block(STARTS + "; exec {raylet} 300")
    folder = block_folder(Layout(tmp_path / "state").run, NAME)
    until = time.monotonic() + 20
    while not (folder / "ray_current_cluster").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == TOLD_TO_END
    assert "told to" in said(tmp_path)
    left_cleanly(tmp_path)
