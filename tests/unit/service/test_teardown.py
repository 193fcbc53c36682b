"""``gateway down`` where little is left to go by: no site, no supervisor, nothing that can be ended."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gateway_plugin.blocks.ledger import Block, BlockPhase, Job, Ledger
from gateway_plugin.errors import ServiceError
from gateway_plugin.paths import Layout, write_private
from gateway_plugin.processes import BLOCK_MARK, find_own
from gateway_plugin.service import up_down as lifecycle
from gateway_plugin.service.teardown import has_blocks
from gateway_plugin.service.up_down import Outcome, down
from tests.support.agents import own_block
from tests.support.gateways import wait_for

NAME = own_block("local")


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Layout]:
    with tempfile.TemporaryDirectory(prefix="gwe-", dir="/tmp") as run:
        monkeypatch.setenv("GATEWAY_RUN_ROOT", run)
        made = Layout(tmp_path / "state")
        made.make()
        yield made


@pytest.fixture
def block() -> Iterator[tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]]:
    """The process of a block's job, and one that runs in the block."""
    argv = [sys.executable, "-c", "import time; time.sleep(60)"]
    pair = subprocess.Popen(argv), subprocess.Popen(argv, env={**os.environ, BLOCK_MARK: NAME})
    yield pair
    for child in pair:
        child.kill()
        child.wait()


def written(layout: Layout, job: Job | None, name: str = NAME) -> Ledger:
    ledger = Ledger(layout.ledger)
    held = Block(name=name, type="local", phase=BlockPhase.RUNNING, asked_at=time.time(), job=job)
    ledger.write({**ledger.read(), name: held})
    return ledger


@pytest.mark.process
def test_a_block_without_its_site_is_ended_by_force_and_does_not_block_the_next_up(
    layout: Layout, block: tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]
) -> None:
    keeper, inside = block
    ledger = written(layout, Job(str(keeper.pid), keeper.pid, psutil.Process(keeper.pid).create_time()))
    assert has_blocks(layout, None)
    with pytest.raises(ServiceError, match=f"block {NAME} .*its site cannot be loaded.*down --force"):
        down(layout.state)
    assert (keeper.poll(), inside.poll()) == (None, None)

    assert down(layout.state, forced=True).outcome is Outcome.ENDED

    assert None not in (keeper.poll(), inside.poll())
    assert ledger.read()[NAME].phase is BlockPhase.LOST
    assert not has_blocks(layout, None)
    assert down(layout.state).outcome is Outcome.NOTHING_RAN


@pytest.mark.process
def test_a_strangers_process_with_a_blocks_pid_is_left_alone(
    layout: Layout, block: tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]
) -> None:
    stranger, _ = block
    ledger = written(layout, Job(str(stranger.pid), stranger.pid, time.time() - 3600.0))
    down(layout.state, forced=True)
    assert stranger.poll() is None
    assert ledger.read()[NAME].phase is BlockPhase.LOST


def test_a_job_in_a_queue_is_named_and_stays_in_the_ledger(layout: Layout) -> None:
    ledger = written(layout, Job("4711"))
    with pytest.raises(ServiceError, match="job 4711: end it with the scheduler's own command"):
        down(layout.state, forced=True)
    assert ledger.read()[NAME].phase is BlockPhase.RUNNING
    assert layout.run.is_dir()


def test_where_nothing_runs_and_something_is_left_it_is_named_and_its_record_is_kept(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = layout.engine_records / "engine.json"
    write_private(record, "{}")
    monkeypatch.setattr(lifecycle, "end_everything", lambda *_, **__: ("engine (pid 4711)",))  # none resists SIGKILL
    with pytest.raises(ServiceError, match=r"could not be ended: engine \(pid 4711\)"):
        down(layout.state)
    assert record.exists()


@pytest.mark.process
def test_a_supervisor_that_ends_between_two_looks_is_no_error(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [sys.executable, "-c", "import time; time.sleep(60)", "-m", "gateway_plugin.service.supervisor"]
    with subprocess.Popen([*argv, "--state", str(layout.state)]) as child:
        name = ("gateway_plugin.service.supervisor", "--state", str(layout.state))
        marks = wait_for(lambda: find_own(name), 10, "a supervisor among the processes")
        assert [known.pid for known in marks] == [child.pid]
        child.kill()
    monkeypatch.setattr(lifecycle, "supervisors_of", lambda _: marks)
    assert down(layout.state).outcome is Outcome.ENDED
