"""The agent puts engines to sleep and wakes them: its reports, its records, its successors, one at a time on a GPU."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway_plugin.catalog import Model
from gateway_plugin.paths import Layout
from gateway_plugin.processes import mark
from serve.agent.devices import Devices
from serve.agent.host_memory import _left_in_cgroups, asleep_mib, available_mib, budget_mib
from serve.agent.host_memory import held_mib as held_by
from serve.agent.node import DevicesUnseen
from serve.agent.sleeping import Mib, Patience
from serve.agent.warm import Gauges
from serve.core.events import EngineAsleep, EngineAwake, EngineExited, EngineReady
from tests.support.agents import (
    NAMED,
    QUICK,
    AgentHost,
    engine_client,
    eventually,
    fake_model,
    own_block,
    private_layout,
)
from tests.support.fake_memory import held_mib
from tests.support.fake_sleep import KEPT_MIB

MEMORY_MIB = 1024
BUDGET_MIB = 4096
PINNED_MIB = 700
HELD_MIB = 50
SLEEP_MIB = PINNED_MIB + HELD_MIB
PATIENT = replace(QUICK, patience=Patience(sleep_s=20.0, wake_s=20.0, settle_s=0.3, answer_s=20.0))


@pytest.mark.parametrize(
    ("asked", "left", "budget", "warned"),
    [
        (None, 128_000, 98_816, False),  # a tenth to spare, 8 GiB for each of two GPUs
        (None, 10_000, 0, False),
        (5000, 128_000, 5000, False),
        (5000, 4000, 4000, True),
    ],
)
def test_the_budget_is_the_sites_or_what_the_node_has_left(
    asked: int | None, left: int, budget: int, warned: bool
) -> None:
    found, warning = budget_mib(asked, left, host_mib=0, gpus=2)
    assert found == budget
    assert bool(warning) == warned
    if warned:
        assert warning == "the site says 5000 MiB for sleeping engines, the node has 4000 MiB left"


@pytest.mark.parametrize(
    ("after", "gone", "found"),
    [
        (2_550, 21_300, 23_800),  # pinned by CUDA: in no process's count
        (23_800, 21_400, 23_900),  # registered: in both
        (23_800, 9_000, 23_800),  # meanwhile another engine gave memory back
        (23_800, -5_000, 23_800),
        (30_000, 28_000, 30_000),  # rounded up, it is more than its GPUs had
        (2_550, 90_000, 24_000),  # meanwhile another engine took memory
        (2_550, -5_000, 24_000),  # not known: the most
    ],
)
def test_what_an_engine_holds_from_its_first_sleep_on(after: int, gone: int, found: int) -> None:
    assert asleep_mib(2_500, after, gone, 24_000) == found


def test_a_jobs_cgroup_may_have_less_left_than_the_node(tmp_path: Path) -> None:
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    job, task = root / "slurm" / "job_1", root / "slurm" / "job_1" / "task_0"
    task.mkdir(parents=True)
    groups.write_text("0::/slurm/job_1/task_0\n")
    (task / "memory.max").write_text("max\n")
    (job / "memory.max").write_text(f"{1000 * 2**20}\n")
    for folder in (job, task):
        (folder / "memory.current").write_text(f"{400 * 2**20}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {60 * 2**20}\nactive_file {40 * 2**20}\n")
    assert list(_left_in_cgroups(groups, root)) == [700]
    assert list(_left_in_cgroups(tmp_path / "none", root)) == []


async def test_on_a_gpu_one_waits_for_the_other() -> None:
    devices = Devices()
    first, elsewhere = await devices.take((0, 1)), await devices.take((2,))
    second = asyncio.create_task(devices.take((1, 2)))
    none = await devices.take(())
    for lease in (none, elsewhere):
        await asyncio.sleep(0)
        assert not second.done()
        lease.release()
    first.release()
    (await second).release()
    first.release()  # twice: takes nothing from others
    async with asyncio.timeout(1):
        await devices.take((0, 1, 2))


@pytest.mark.process
def test_what_the_processes_of_a_group_hold() -> None:
    hold = "import sys; held = b'x' * 50 * 2**20; print(flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        known = mark(child.pid)
        assert known is not None
        assert 50 <= held_by(known) < 100
        child.stdin.close()
    assert held_by(known) == 0
    assert available_mib() > 0


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> Iterator[Layout]:
    monkeypatch.setenv("RAY_CLOUD_INSTANCE_ID", own_block())
    with private_layout() as made:
        yield made


@pytest.fixture
def host(layout: Layout, tmp_path: Path) -> Iterator[AgentHost]:
    async def used_mib(names: tuple[str, ...]) -> Mib:
        return (held_mib(tmp_path),) * len(names)

    left = iter(range(100 * PINNED_MIB, 0, -PINNED_MIB))  # each reading finds less
    gauges = Gauges(used_mib, lambda: next(left), lambda _: HELD_MIB)
    made = AgentHost(layout, timing=PATIENT, gpu_mib=(MEMORY_MIB,), sleep_mib=BUDGET_MIB, gauges=gauges)
    yield made
    made.close()


def sleeper(folder: Path, *faults: str, **fields: Any) -> Model:
    """A fake engine on a GPU that can sleep."""
    options = ["--memory-marker", str(folder), "--memory-mib", str(MEMORY_MIB), "--enable-sleep-mode"]
    options += [word for fault in faults for word in ("--sleep-fault", fault)]
    return fake_model("tiny", "generate", *options, gpus=1, sleep=True, **fields)


@pytest.mark.process
def test_it_sleeps_once_after_loading_then_as_it_is_asked_to_and_is_adopted_asleep(
    host: AgentHost, tmp_path: Path
) -> None:
    assert host.describe().sleep_mib == BUDGET_MIB
    host.start(sleeper(tmp_path), gpus=(0,), sleep_mib=MEMORY_MIB)
    ready = host.wait(EngineReady)
    assert (ready.can_sleep, ready.sleep_mib) == (True, SLEEP_MIB)
    assert held_mib(tmp_path) == MEMORY_MIB

    host.sleep()
    asleep = host.wait(EngineAsleep)
    assert (asleep.sleep_mib, asleep.kept_mib) == (SLEEP_MIB, KEPT_MIB)
    host.sleep()
    assert host.wait(EngineAsleep).kept_mib == KEPT_MIB, "asked again, it says so again"
    assert held_mib(tmp_path) == KEPT_MIB

    host.crash()
    (found,) = host.describe().engines
    assert (found.asleep, found.ready, found.under_way, found.can_sleep) == (True, False, "", True)
    assert (found.sleep_mib, found.kept_mib, found.address) == (SLEEP_MIB, KEPT_MIB, ready.address)
    host.wake()
    host.wait(EngineAwake)
    (found,) = host.describe().engines
    assert (found.asleep, found.ready) == (False, True)
    with engine_client(host.layout, found.address) as client:
        assert client.post("/v1/completions", json={"prompt": "x"}, extensions=NAMED).status_code == 200
    host.stop()
    assert host.wait(EngineExited).expected


@pytest.mark.process
def test_one_in_doubt_is_ended(host: AgentHost, tmp_path: Path) -> None:
    host.start(sleeper(tmp_path, "gibberish"), gpus=(0,))
    assert host.wait(EngineReady).sleep_mib == 0
    host.sleep()
    host.wait(EngineAsleep)
    host.wake()
    exited = host.wait(EngineExited)
    assert (exited.doubt, exited.expected) == (True, False)
    assert exited.reason.startswith("in doubt: after its sleep it answers the same request differently")
    assert exited.summary == "its sleep or its waking went wrong"

    host.start(sleeper(tmp_path, "leak"), "e2", gpus=(0,), sleep_mib=MEMORY_MIB)
    assert host.wait(EngineExited, "e2").doubt, "before it serves"
    host.start(sleeper(tmp_path, "nonsense"), "e3", gpus=(0,), sleep_mib=MEMORY_MIB)
    ready = host.wait(EngineReady, "e3")
    assert (ready.can_sleep, ready.sleep_mib) == (False, 0), "it serves, and never sleeps"


@pytest.mark.process
def test_one_that_holds_too_little_to_free_serves_and_never_sleeps(host: AgentHost, tmp_path: Path) -> None:
    """An encoder, say: it must not be loaded twice to find that out."""
    host.start(sleeper(tmp_path, memory_gib=16), gpus=(0,), sleep_mib=MEMORY_MIB)
    ready = host.wait(EngineReady)
    assert (ready.can_sleep, ready.sleep_mib) == (False, 0)


@pytest.mark.process
def test_one_that_holds_less_than_it_is_given_is_judged_by_what_it_holds(host: AgentHost, tmp_path: Path) -> None:
    """What it may take for large prompts it does not hold once it is loaded."""
    host.start(sleeper(tmp_path, memory_gib=1.9), gpus=(0,), sleep_mib=MEMORY_MIB)
    assert host.wait(EngineReady).can_sleep
    assert host.record().held_mib == MEMORY_MIB


@pytest.mark.process
def test_the_next_agent_finds_the_same_budget_beside_engines_that_run(layout: Layout, tmp_path: Path) -> None:
    """What they hold was left before; else a smaller budget would end sleepers."""

    async def used_mib(names: tuple[str, ...]) -> Mib:
        return (held_mib(tmp_path),) * len(names)

    left_mib = [BUDGET_MIB]
    gauges = Gauges(used_mib, lambda: left_mib[0], lambda _: HELD_MIB)
    host = AgentHost(layout, timing=PATIENT, gpu_mib=(MEMORY_MIB,), sleep_mib=BUDGET_MIB, gauges=gauges)
    try:
        host.start(sleeper(tmp_path), gpus=(0,))
        host.wait(EngineReady)
        left_mib[0] -= HELD_MIB
        host.crash()
        assert host.describe().sleep_mib == BUDGET_MIB
    finally:
        host.close()


@pytest.mark.process
def test_one_whose_gpu_cannot_be_read_is_not_started_for_sleep(layout: Layout, tmp_path: Path) -> None:
    """A part of a GPU, or one of another maker: vLLM may not even know the option."""

    async def unseen(names: tuple[str, ...]) -> Mib:
        raise DevicesUnseen("No devices were found")

    gauges = Gauges(unseen, lambda: 100 * PINNED_MIB, lambda _: HELD_MIB)
    host = AgentHost(layout, timing=PATIENT, gpu_mib=(MEMORY_MIB,), sleep_mib=BUDGET_MIB, gauges=gauges)
    try:
        host.start(sleeper(tmp_path), gpus=(0,), sleep_mib=MEMORY_MIB)
        assert not host.wait(EngineReady).can_sleep
        assert not host.record().sleeps
    finally:
        host.close()


@pytest.mark.process
def test_one_whose_agent_was_lost_while_it_fell_asleep_is_in_doubt(host: AgentHost, tmp_path: Path) -> None:
    host.start(sleeper(tmp_path, "sleep-hangs"), gpus=(0,))
    host.wait(EngineReady)
    host.sleep()
    assert eventually(lambda: host.record().sleep == "sleep")
    assert host.describe().engines[0].under_way == "sleep"
    host.crash()
    exited = host.wait(EngineExited)
    assert exited.doubt
    assert exited.reason.startswith("in doubt: its agent was lost while it fell asleep or woke")


@pytest.mark.process
def test_one_that_dies_in_its_first_sleep_is_in_doubt(host: AgentHost, tmp_path: Path) -> None:
    """Else its model would count as one that cannot be loaded."""
    host.start(sleeper(tmp_path, "sleep-hangs"), gpus=(0,), sleep_mib=MEMORY_MIB)
    assert eventually(lambda: host.record().sleep == "sleep")
    psutil.Process(host.record().pid).send_signal(signal.SIGKILL)
    assert host.wait(EngineExited).doubt


@pytest.mark.process
def test_one_that_dies_asleep_is_reported_and_one_stopped_asleep_is_gone(host: AgentHost, tmp_path: Path) -> None:
    for name in ("e1", "e2"):
        host.start(sleeper(tmp_path), name, gpus=(0,))
        host.wait(EngineReady, name)
        host.sleep(name)
        host.wait(EngineAsleep, name)
    psutil.Process(host.record("e1").pid).send_signal(signal.SIGKILL)
    exited = host.wait(EngineExited, "e1")
    assert (exited.expected, exited.doubt) == (False, False)
    host.stop("e2")
    assert host.wait(EngineExited, "e2").expected
