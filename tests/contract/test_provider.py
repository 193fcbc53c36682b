"""What every kind of blocks can do: a fake queue, this machine (Parsl's real ``LocalProvider``), a real Slurm, and a
stand-in for PBS."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider, PBSProProvider, SlurmProvider

from gateway_plugin.blocks.ledger import Block, BlockPhase, Ledger
from gateway_plugin.blocks.pool import BlockPool, end_all
from gateway_plugin.errors import ServiceError
from gateway_plugin.paths import Layout, private_folder
from gateway_plugin.processes import mark
from gateway_plugin.schedulers import base
from gateway_plugin.schedulers.select import scheduler_for
from tests.support.agents import own_block
from tests.support.clusters import wait_for
from tests.support.queue import QueueProvider, Scheduler

TYPE = "node"
NAME = own_block(TYPE)


class Bench(ABC):
    """One kind of blocks under test. ``pool()`` is what a new process would make: nothing but the ledger is kept."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.ledger = Ledger(layout.ledger)

    @abstractmethod
    def jobs(self) -> base.Scheduler: ...

    @abstractmethod
    def script(self, exit_code: int | None) -> str:
        """A job that leaves at once with ``exit_code``, or (None) runs until it is told to end."""

    def happens(self, name: str, phase: BlockPhase) -> None:  # noqa: B027
        """Let the scheduler come to this, where it does not by itself."""

    def pool(self, max_blocks: int = 2) -> BlockPool:
        return BlockPool(self.ledger, {TYPE: self.jobs()}, {TYPE: max_blocks})

    def reaches(self, pool: BlockPool, name: str, phase: BlockPhase) -> Block:
        self.happens(name, phase)

        def there() -> Block | None:
            pool.refresh()
            block = pool.find(name)
            return block if block is not None and block.phase is phase else None

        block: Block = wait_for(there, f"{name} {phase.value}", timeout_s=20, pause_s=0.02)
        return block


class QueueBench(Bench):
    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.scheduler = Scheduler()

    def jobs(self) -> base.Scheduler:
        return scheduler_for(QueueProvider(self.scheduler), self.layout)

    def script(self, exit_code: int | None) -> str:
        return "true"

    def happens(self, name: str, phase: BlockPhase) -> None:
        if phase is not BlockPhase.CANCELLED:
            self.scheduler.move(name, phase)


class LocalBench(Bench):
    def jobs(self) -> base.Scheduler:
        return scheduler_for(LocalProvider(launcher=SimpleLauncher()), self.layout)

    def script(self, exit_code: int | None) -> str:
        if exit_code is not None:
            return f"exit {exit_code}"
        return "trap 'exit 0' TERM\nwhile true; do sleep 0.1 & wait $!; done"


class SlurmBench(LocalBench):
    """Runs the same scripts; needs the fixture ``slurm``."""

    def jobs(self) -> base.Scheduler:
        return scheduler_for(
            SlurmProvider(launcher=SimpleLauncher(), exclusive=False, walltime="00:05:00"), self.layout
        )


class PbsBench(LocalBench):
    """The same again; needs the fixture ``pbs``. The scheduler is a stand-in, Parsl's provider and ours are not."""

    def jobs(self) -> base.Scheduler:
        return scheduler_for(PBSProProvider(launcher=SimpleLauncher(), queue="workq", walltime="00:05:00"), self.layout)


@contextlib.contextmanager
def opened(kind: Callable[[Layout], Bench]) -> Iterator[Bench]:
    root = Path(tempfile.mkdtemp(prefix="gwt-", dir="/tmp"))
    layout = Layout(private_folder(root / "state"))
    layout.make()
    bench = kind(layout)
    try:
        yield bench
    finally:
        left = end_all(bench.pool(), deadline_s=20)
        shutil.rmtree(root)
        shutil.rmtree(layout.run)
        assert not left


@pytest.fixture(params=[QueueBench, LocalBench, PbsBench, pytest.param(SlurmBench, marks=pytest.mark.slurm)])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    if request.param is SlurmBench:
        request.getfixturevalue("slurm")
    if request.param is PbsBench:
        request.getfixturevalue("pbs")
    with opened(request.param) as bench:
        yield bench


@pytest.fixture
def local() -> Iterator[Bench]:
    with opened(LocalBench) as bench:
        yield bench


def test_a_block_is_submitted_runs_and_is_given_back(bench: Bench) -> None:
    pool = bench.pool()
    block = pool.submit(NAME, TYPE, bench.script(None), {"color": "blue"})
    assert block.job is not None
    assert bench.ledger.read()[block.name].job == block.job
    assert bench.ledger.path.stat().st_mode & 0o777 == 0o600
    bench.reaches(pool, block.name, BlockPhase.RUNNING)
    pool.cancel([block.name])
    ended = bench.reaches(pool, block.name, BlockPhase.CANCELLED)
    assert pool.holding() == ()
    assert ended.ended_at is not None
    assert ended.tags == {"color": "blue"}


@pytest.mark.parametrize(("code", "phase"), [(0, BlockPhase.COMPLETED), (3, BlockPhase.FAILED)])
def test_how_a_block_ended_is_kept(bench: Bench, code: int, phase: BlockPhase) -> None:
    pool = bench.pool()
    pool.submit(NAME, TYPE, bench.script(code), {})
    ended = bench.reaches(pool, NAME, phase)
    bench.happens(NAME, BlockPhase.COMPLETED)  # Parsl says so of a failed job on its next poll
    pool.refresh()
    pool.cancel([NAME])
    assert pool.find(NAME) == ended == bench.ledger.read()[NAME]


def test_a_new_process_takes_over_and_ends_the_block(bench: Bench) -> None:
    first = bench.pool()
    block = first.submit(NAME, TYPE, bench.script(None), {"color": "blue"})
    bench.reaches(first, block.name, BlockPhase.RUNNING)
    second = bench.pool()
    (adopted,) = second.refresh()
    assert (adopted.name, adopted.job, adopted.tags) == (block.name, block.job, block.tags)
    assert adopted.phase is BlockPhase.RUNNING
    second.cancel([block.name])
    bench.reaches(second, block.name, BlockPhase.CANCELLED)


def test_a_submit_cut_short_after_the_job_was_there_is_found(bench: Bench) -> None:
    first = bench.pool()
    block = first.submit(NAME, TYPE, bench.script(None), {})
    bench.reaches(first, block.name, BlockPhase.RUNNING)
    # What the ledger says when the process dies between the scheduler's answer and the next line.
    bench.ledger.write({block.name: replace(block, phase=BlockPhase.SUBMITTING, job=None)})
    second = bench.pool(max_blocks=1)
    with pytest.raises(ServiceError, match="no more than 1"):  # in doubt counts: it is not submitted twice
        second.submit("gw-node-00000002", TYPE, bench.script(None), {})
    found = bench.reaches(second, block.name, BlockPhase.RUNNING)
    assert found.job is not None
    assert block.job is not None
    assert (found.job.id, found.job.script) == (block.job.id, block.job.script)
    second.cancel([block.name])
    bench.reaches(second, block.name, BlockPhase.CANCELLED)


def test_a_submit_cut_short_before_there_was_a_job_is_forgotten(bench: Bench) -> None:
    now = 1_000_000.0
    # No other test's name: a queue remembers for minutes what has ended.
    doubt = Block(name="gw-node-00000009", type=TYPE, phase=BlockPhase.SUBMITTING, asked_at=now)
    bench.ledger.write({doubt.name: doubt})
    jobs = bench.jobs()
    pool = BlockPool(bench.ledger, {TYPE: jobs}, {TYPE: 1}, clock=lambda: now, monotonic=lambda: now)
    assert [block.name for block in pool.refresh()] == [doubt.name]  # it may still show up
    now += jobs.in_doubt_s + 1
    assert pool.refresh() == ()
    (forgotten,) = bench.ledger.read().values()
    assert forgotten.phase is BlockPhase.LOST


def test_a_block_cancelled_by_a_process_that_died_is_cancelled_by_the_next(bench: Bench) -> None:
    first = bench.pool()
    block = first.submit(NAME, TYPE, bench.script(None), {})
    running = bench.reaches(first, block.name, BlockPhase.RUNNING)
    bench.ledger.write({block.name: replace(running, phase=BlockPhase.CANCELLING)})
    bench.reaches(bench.pool(), block.name, BlockPhase.CANCELLED)


def test_no_more_blocks_than_the_site_allows(bench: Bench) -> None:
    pool = bench.pool(max_blocks=1)
    pool.submit(NAME, TYPE, bench.script(None), {})
    with pytest.raises(ServiceError, match=NAME):
        pool.submit("gw-node-00000002", TYPE, bench.script(None), {})
    assert len(pool.refresh()) == 1


# About processes of this machine:


def test_a_killed_block_is_lost_and_nothing_of_it_is_left(local: Bench) -> None:
    pool = local.pool()
    child = f"RAY_CLOUD_INSTANCE_ID={NAME} setsid sleep 300 & echo $! > {local.layout.run}/child\n"
    block = pool.submit(NAME, TYPE, child + local.script(None), {})
    local.reaches(pool, NAME, BlockPhase.RUNNING)
    note = local.layout.run / "child"
    child_pid = int(wait_for(lambda: note.exists() and note.read_text().strip(), "child", pause_s=0.02))
    assert block.job is not None
    assert block.job.pid is not None
    keeper = psutil.Process(block.job.pid)
    keeper.suspend()  # first: from then on it starts and reaps nothing
    wait_for(lambda: keeper.status() == psutil.STATUS_STOPPED, "the keeper's stop", pause_s=0.02)
    children = keeper.children()
    for process in children:
        process.suspend()
    for process in (*children, keeper):
        if process.pid != child_pid:
            process.kill()
    local.reaches(pool, NAME, BlockPhase.LOST)
    wait_for(lambda: mark(child_pid) is None, "child's end")


def test_a_pid_that_somebody_else_has_by_now_is_left_alone(local: Bench) -> None:
    child = subprocess.Popen(["sleep", "300"])
    stranger = psutil.Process(child.pid)
    try:
        pool = local.pool()
        block = pool.submit(NAME, TYPE, local.script(0), {})
        assert block.job is not None
        local.reaches(pool, block.name, BlockPhase.COMPLETED)
        job = replace(block.job, pid=stranger.pid, started=stranger.create_time() - 100, id=str(stranger.pid))
        local.ledger.write({block.name: replace(block, phase=BlockPhase.RUNNING, job=job)})
        second = local.pool()
        second.cancel([block.name])
        local.reaches(second, block.name, BlockPhase.CANCELLED)
        assert stranger.is_running()
        assert stranger.status() != psutil.STATUS_ZOMBIE
    finally:
        child.kill()
        child.wait()


def test_a_block_that_will_not_end_is_killed(local: Bench) -> None:
    now = 1_000_000.0
    pool = BlockPool(local.ledger, {TYPE: local.jobs()}, {TYPE: 1}, clock=lambda: now, monotonic=lambda: now)
    deaf = local.layout.run / "deaf"
    block = pool.submit(NAME, TYPE, f"trap '' TERM\ntouch {deaf}\nwhile true; do sleep 0.1; done", {})
    local.reaches(pool, block.name, BlockPhase.RUNNING)
    wait_for(deaf.exists, "its trap")
    pool.cancel([block.name])
    assert [held.phase for held in pool.refresh()] == [BlockPhase.CANCELLING]
    now += 60
    local.reaches(pool, block.name, BlockPhase.CANCELLED)
    assert block.job is not None
    assert block.job.pid is not None
    assert mark(block.job.pid) is None
