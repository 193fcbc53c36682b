"""Which old logs go, and that those of the living stay."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from gateway_plugin.blocks.node_provider import prune_blocks
from gateway_plugin.log_retention import prune, surplus
from gateway_plugin.paths import Layout
from serve.agent.processes import end_group, prune_engine_logs, spawn


def test_the_oldest_go_and_the_spared_neither_go_nor_count() -> None:
    newest = {f"e{n}": float(n) for n in range(6)}
    assert surplus(newest, (), keep=6) == ()
    assert surplus(newest, (), keep=4) == ("e0", "e1")
    assert surplus(newest, ("e0",), keep=4) == ("e1",)
    assert surplus(newest, tuple(newest), keep=0) == ()
    assert surplus({"b": 1.0, "a": 1.0}, (), keep=1) == ("a",)
    assert surplus({}, (), keep=0) == ()


def aged(path: Path, when: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    os.utime(path, (when, when))
    return path


def test_all_files_of_an_owner_go_together_by_its_newest(tmp_path: Path) -> None:
    for name, when in (("old.log", 1), ("old.log.1", 2), ("late.log", 9), ("late.log.1", 0)):
        aged(tmp_path / name, when)
    assert prune(tmp_path.iterdir(), lambda path: path.name.partition(".")[0], (), keep=1) == ("old",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late.log", "late.log.1"]


@pytest.mark.process
async def test_an_engines_log_stays_while_the_engine_or_a_child_of_it_lives(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.engine_logs.mkdir(parents=True)
    long_lived = layout.engine_logs / "lives-1-1.log"
    # the first process leaves, its child writes on
    spawned = spawn(("bash", "-c", "sleep 60 & exit 0"), {"PATH": os.environ["PATH"]}, long_lived)
    spawned.child.wait()
    os.utime(long_lived, (0, 0))
    for number in range(3):
        aged(layout.engine_logs / f"over-1-{number}.log", 10 + number)
    try:
        prune_engine_logs(layout, (), keep=2)
        assert names(layout.engine_logs) == ["lives-1-1.log", "over-1-1.log", "over-1-2.log"]
    finally:
        await end_group(spawned.mark, 0.0)
    prune_engine_logs(layout, (), keep=2)
    assert names(layout.engine_logs) == ["over-1-1.log", "over-1-2.log"]
    prune_engine_logs(layout, ("over-1-1",), keep=0)
    assert names(layout.engine_logs) == ["over-1-1.log"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_blocks_logs_and_job_files_go_together_and_those_that_hold_a_place_stay(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for number in range(4):
        aged(layout.logs / f"block-gw-cpu-0000000{number}.log", number)
        for ending in ("sh", "sh.ec", "sh.out", "sh.err"):
            aged(layout.block_scripts / f"gw-cpu-0000000{number}.1700000000.5.{ending}", number)
        aged(layout.leave_marks / f"gw-cpu-0000000{number}", number)
    aged(layout.block_scripts / "notes.txt", 0)
    aged(layout.edge_log, 0)
    prune_blocks(layout, ("gw-cpu-00000000",), keep=1)
    assert names(layout.logs) == ["block-gw-cpu-00000000.log", "block-gw-cpu-00000003.log", "edge.log"]
    assert names(layout.leave_marks) == ["gw-cpu-00000000", "gw-cpu-00000003"]
    assert names(layout.block_scripts) == sorted(
        ["notes.txt"]
        + [f"gw-cpu-0000000{n}.1700000000.5.{e}" for n in (0, 3) for e in ("sh", "sh.ec", "sh.out", "sh.err")]
    )


@pytest.mark.process
def test_a_file_that_cannot_be_removed_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder.log").mkdir()
    prune(tmp_path.iterdir(), lambda path: path.name, (), keep=0)
    assert subprocess.run(["test", "-d", str(tmp_path / "folder.log")], check=False).returncode == 0
