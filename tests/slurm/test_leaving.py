"""How blocks leave on a real Slurm: what signals really reach, who knows when a job ends, and what outlives a slurmd.

The script is the real one; in place of Ray runs a process that says when it is told to end, and in place of engines one
that says the same.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from gateway_plugin.blocks.job_script import block_script
from gateway_plugin.blocks.leaving import Leaving
from gateway_plugin.blocks.ledger import Block, BlockPhase, Ledger
from gateway_plugin.blocks.pool import BlockPool
from gateway_plugin.paths import Layout, block_folder, block_log
from gateway_plugin.processes import mark
from gateway_plugin.schedulers.base import Scheduler
from gateway_plugin.schedulers.select import scheduler_for
from gateway_plugin.site import NodeType
from tests.support.agents import own_block
from tests.support.clusters import wait_for
from tests.support.ray_stand_in import RUNS, stand_in
from tests.support.slurm.blocks import look, reaches, slurm_provider
from tests.support.slurm.virtual import VirtualSlurm

pytestmark = pytest.mark.slurm
NAME = own_block("node")
ENGINE = "setsid bash -c 'trap \"echo engine was told; exit\" TERM; echo $$ >{folder}/engine; sleep 300 & wait' & "


@dataclass
class Running:
    """A block that runs, with one engine recorded on it."""

    layout: Layout
    jobs: Scheduler
    pool: BlockPool
    block: Block
    folder: Path
    record: Path

    def said(self) -> str:
        return block_log(self.layout, NAME).read_text()

    def engine(self) -> psutil.Process:
        return psutil.Process(int((self.folder / "engine").read_text()))

    @property
    def job(self) -> str:
        assert self.block.job is not None
        return self.block.job.id


Start = Callable[..., Running]


@pytest.fixture
def start(slurm: VirtualSlurm, layout: Layout) -> Start:
    def running(leaving: Leaving, **options: object) -> Running:
        folder = block_folder(layout.run, NAME)
        provider = slurm_provider(**options)
        node_type = NodeType(name="node", provider=provider, cpus=1, engine_memory_gib=1)
        python = stand_in(layout.state, folder, ENGINE + RUNS)
        script = block_script(NAME, node_type, layout, "127.0.0.1:1", str(python), leaving=leaving)
        jobs = scheduler_for(provider, layout)
        pool = BlockPool(Ledger(layout.ledger), {"node": jobs}, {"node": 1}, marks=layout.leave_marks)
        block = pool.submit(NAME, "node", script, {})
        reaches(jobs, block, BlockPhase.RUNNING)
        told = folder / "engine"
        up = lambda: (folder / "ray_current_cluster").exists() and told.exists() and told.read_text()  # noqa: E731
        wait_for(up, "the block's script", timeout_s=60)
        record = layout.engine_records / "e.json"
        record.write_text(json.dumps({"engine": "e", "block": NAME, "pid": 1}))
        return Running(layout, jobs, pool, block, folder, record)

    return running


def scancel(slurm: VirtualSlurm, running: Running) -> None:
    slurm.run("scancel", running.job)


def preempt(slurm: VirtualSlurm, running: Running) -> None:
    slurm.run("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 60")


@pytest.mark.parametrize(
    ("ends", "phase"), [(scancel, BlockPhase.CANCELLED), (preempt, BlockPhase.LOST)], ids=["scancel", "preempted"]
)
def test_ended_by_others_it_gives_notice_and_its_engines_go_on(
    slurm: VirtualSlurm,
    start: Start,
    ends: Callable[[VirtualSlurm, Running], None],
    phase: BlockPhase,
) -> None:
    running = start(Leaving(walltime_s=300), partition="low")
    ends(slurm, running)
    wait_for(lambda: (running.folder / "notice").exists(), "a notice", timeout_s=60)
    assert running.engine().is_running()
    assert "was told" not in running.said()  # neither Ray nor the engine
    running.record.unlink()  # drained, and ended by its agent
    wait_for(lambda: "no engine is left" in running.said(), "the block to leave", timeout_s=30)
    reaches(running.jobs, running.block, phase)
    assert not running.folder.exists()


def test_a_forced_cancel_is_sigterm_too(slurm: VirtualSlurm, start: Start) -> None:
    """``scancel --signal=KILL --full`` is to Slurm what ``scancel`` is: SIGKILL comes after ``KillWait``."""
    running = start(Leaving(walltime_s=300))
    slurm.run("scancel", "--signal=KILL", "--full", running.job)
    wait_for(lambda: (running.folder / "notice").exists(), "a notice", timeout_s=20)
    running.record.unlink()
    reaches(running.jobs, running.block, BlockPhase.CANCELLED)


def test_ended_by_the_gateway_it_leaves_at_once(slurm: VirtualSlurm, start: Start) -> None:
    running = start(Leaving(walltime_s=300))
    running.pool.cancel([NAME])
    reaches(running.jobs, running.block, BlockPhase.CANCELLED, timeout_s=18)
    assert "leaving: told to\n" in running.said()
    assert "leaving within" not in running.said()


def test_a_script_that_is_killed_takes_all_that_it_started_with_it(start: Start) -> None:
    """The node sees to it: ``proctrack/cgroup``, or here its epilog."""
    running = start(Leaving(walltime_s=300))
    engine = running.engine()
    batch_shell = engine.parents()[1]
    assert "slurm_script" in " ".join(batch_shell.cmdline())
    batch_shell.kill()
    assert "signal 9" in (reaches(running.jobs, running.block, BlockPhase.FAILED).reason or "")
    wait_for(lambda: mark(engine.pid) is None, "its engine's end", 30)


def test_it_leaves_before_an_end_that_was_changed_while_it_ran(slurm: VirtualSlurm, start: Start) -> None:
    running = start(Leaving(walltime_s=300, before_end_s=50, ask_every_s=5))
    slurm.run("scontrol", "update", f"JobId={running.job}", "TimeLimit=1")
    seen = reaches(running.jobs, running.block, BlockPhase.COMPLETED, timeout_s=60)
    assert seen.reason is None
    assert "leaving: its walltime ends" in running.said()


def test_a_job_that_slurm_gave_up_ends_though_nobody_can_tell_it(slurm: VirtualSlurm, start: Start) -> None:
    running = start(Leaving(walltime_s=300, look_every_s=1))
    node = running.jobs.status([running.block])[NAME].node or ""
    os.kill(int(slurm.places.pid_file(f"slurmd.{node}").read_text()), signal.SIGKILL)
    try:
        slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        wait_for(lambda: (seen := look(running.jobs, running.block)) and seen.phase is BlockPhase.LOST, "lost", 30)
        assert running.engine().is_running()
        wait_for(lambda: not running.pool.refresh(), "the pool to see it", timeout_s=30)
        wait_for(lambda: "leaving: told to by its mark" in running.said(), "the block to leave", timeout_s=30)
        wait_for(lambda: not running.folder.exists(), "its folder to go", timeout_s=20)
    finally:
        slurm.start_node(int(node.removeprefix("n")))
