"""``SlurmScheduler`` on a real Slurm: how a job waits, runs and ends; and a controller that is away."""

from __future__ import annotations

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from gateway_plugin.blocks.ledger import BlockPhase, Job, Ledger
from gateway_plugin.blocks.pool import BlockPool
from gateway_plugin.errors import ServiceError
from gateway_plugin.paths import Layout, block_log
from gateway_plugin.schedulers.base import SchedulerSilent
from gateway_plugin.schedulers.queue import GONE_AFTER_S
from gateway_plugin.schedulers.select import scheduler_for
from gateway_plugin.schedulers.slurm import SlurmScheduler
from tests.support.clusters import wait_for
from tests.support.slurm.blocks import ENDLESS, look, reaches, slurm_provider, submitted
from tests.support.slurm.virtual import VirtualSlurm

pytestmark = pytest.mark.slurm
NAME = "gw-node-00000001"


def test_a_job_runs_on_a_node_until_its_walltime(slurm: VirtualSlurm, layout: Layout) -> None:
    jobs = scheduler_for(slurm_provider(walltime="00:05:00"), layout)
    seen = reaches(jobs, submitted(jobs, NAME), BlockPhase.RUNNING)
    assert seen.node in ("n1", "n2")
    assert seen.starts_at is not None
    assert seen.ends_at == seen.starts_at + 300
    assert abs(seen.starts_at - time.time()) < 30


def test_a_pending_job_says_why_and_when(slurm: VirtualSlurm, layout: Layout) -> None:
    jobs = scheduler_for(slurm_provider(exclusive=True), layout)
    first, second = submitted(jobs, "gw-node-00000001"), submitted(jobs, "gw-node-00000002")
    for block in (first, second):
        reaches(jobs, block, BlockPhase.RUNNING)
    third = submitted(jobs, "gw-node-00000003")
    assert reaches(jobs, third, BlockPhase.PENDING).reason in ("Resources", "Priority", None)
    wait_for(lambda: (seen := look(jobs, third)) and seen.starts_at, "the queue's estimate", timeout_s=20)
    seen = jobs.status([first, second, third])[third.name]
    assert (seen.phase, seen.reason) == (BlockPhase.PENDING, "Resources")
    assert seen.starts_at is not None
    assert 200 < seen.starts_at - time.time() < 400  # when the first of the others reaches its walltime
    jobs.cancel(third, forced=False)
    assert reaches(jobs, third, BlockPhase.CANCELLED).node is None
    jobs.cancel(second, forced=True)
    reaches(jobs, second, BlockPhase.CANCELLED)
    jobs.cancel(first, forced=False)
    reaches(jobs, first, BlockPhase.CANCELLED)


def test_a_walltime_over_the_partitions_shows_as_the_reason(slurm: VirtualSlurm, layout: Layout) -> None:
    jobs = scheduler_for(slurm_provider(partition="short", walltime="01:00:00"), layout)
    block = submitted(jobs, NAME)  # sbatch takes it, and it pends for ever
    wait_for(lambda: (seen := look(jobs, block)) and seen.reason == "PartitionTimeLimit", "the reason", timeout_s=15)


def test_walltime_ends_a_block_as_expired(slurm: VirtualSlurm, layout: Layout) -> None:
    jobs = scheduler_for(slurm_provider(), layout)
    block = submitted(jobs, NAME)
    reaches(jobs, block, BlockPhase.RUNNING)
    assert block.job is not None
    slurm.run("scontrol", "update", f"JobId={block.job.id}", "EndTime=now+2seconds")  # after its start
    seen = reaches(jobs, block, BlockPhase.EXPIRED, timeout_s=60)  # looked at by Slurm every 30 s
    assert seen.reason is not None
    assert seen.reason.startswith("its walltime ended")


def test_a_failed_script_gives_its_exit_code_and_last_words(slurm: VirtualSlurm, layout: Layout) -> None:
    jobs = scheduler_for(slurm_provider(), layout)
    early = submitted(jobs, "gw-node-00000001", "echo 'no such module' >&2\nexit 3")
    late = submitted(jobs, "gw-node-00000002", f"exec >>{block_log(layout, 'gw-node-00000002')}\necho no head; exit 73")
    shot = submitted(jobs, "gw-node-00000003", "kill -KILL $$")
    why = reaches(jobs, early, BlockPhase.FAILED).reason or ""
    assert why.startswith("its script left with exit code 3 on n")
    assert why.endswith(": no such module")
    assert (reaches(jobs, late, BlockPhase.FAILED).reason or "").endswith(": no head")
    assert "signal 9" in (reaches(jobs, shot, BlockPhase.FAILED).reason or "")
    done = submitted(jobs, "gw-node-00000004", "exit 0")
    assert reaches(jobs, done, BlockPhase.COMPLETED).reason is None


def test_a_node_that_goes_down_loses_its_block_and_slurm_does_not_start_it_again(
    slurm: VirtualSlurm, layout: Layout
) -> None:
    jobs = scheduler_for(slurm_provider(), layout)
    block = submitted(jobs, NAME)
    node = reaches(jobs, block, BlockPhase.RUNNING).node
    slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    seen = reaches(jobs, block, BlockPhase.LOST)
    assert (seen.reason or "").startswith("its node failed")
    assert "PENDING" not in slurm.run("squeue", "-h", "-t", "all", "-o", "%T")


def test_a_preempted_block_is_lost_and_says_so(slurm: VirtualSlurm, layout: Layout) -> None:
    jobs = scheduler_for(slurm_provider(partition="low"), layout)
    block = submitted(jobs, NAME)
    reaches(jobs, block, BlockPhase.RUNNING)
    slurm.run("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 60")
    assert (reaches(jobs, block, BlockPhase.LOST).reason or "").startswith("preempted")


def test_fake_gpus_are_given_out(slurm: VirtualSlurm, layout: Layout) -> None:
    jobs = scheduler_for(slurm_provider(gpus_per_node=1), layout)
    blocks = [
        submitted(jobs, f"gw-node-0000000{n}", f"echo $CUDA_VISIBLE_DEVICES >{layout.state}/gpu{n}\n{ENDLESS}")
        for n in range(4)
    ]
    where = [reaches(jobs, block, BlockPhase.RUNNING).node for block in blocks]
    files = [layout.state / f"gpu{n}" for n in range(4)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files), "the jobs to write", timeout_s=10)
    given = {(node, file.read_text().strip()) for node, file in zip(where, files, strict=True)}
    assert given == {("n1", "0"), ("n1", "1"), ("n2", "0"), ("n2", "1")}


def test_what_the_shell_has_of_slurms_variables_does_not_bend_a_submit(
    slurm: VirtualSlurm, layout: Layout, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For ``sbatch`` they count more than the script's own lines. A gateway may be started inside a job, too."""
    bent = {
        "SBATCH_JOB_NAME": "other",
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_PARTITION": "short",
        "SBATCH_ARRAY_INX": "1-3",
        "SLURM_JOB_ID": "4711",
        "SLURM_CLUSTERS": "nowhere",
    }
    for name, value in bent.items():
        monkeypatch.setenv(name, value)
    jobs = scheduler_for(slurm_provider(), layout)
    seen = reaches(jobs, submitted(jobs, NAME), BlockPhase.RUNNING)
    assert seen.starts_at is not None
    assert seen.ends_at == seen.starts_at + 300
    env = {name: value for name, value in os.environ.items() if name not in bent}
    row = subprocess.run(("squeue", "-h", "-o", "%j|%P"), env=env, capture_output=True, text=True, check=True).stdout
    assert row.startswith(f"{NAME}.")
    assert row.endswith("|debug\n")
    assert row.count("\n") == 1
    assert "ignored" in caplog.text
    assert "SBATCH_PARTITION" in caplog.text
    for name in bent:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"partition": "nope"}, "invalid partition specified: nope"),
        ({"gpus_per_node": 7}, "Requested node configuration is not available"),
    ],
)
def test_a_refusal_is_in_sbatchs_own_words(
    slurm: VirtualSlurm, layout: Layout, options: dict[str, object], said: str
) -> None:
    with pytest.raises(ServiceError, match=f"block {NAME} was refused by Slurm: sbatch: error: .*{said}"):
        scheduler_for(slurm_provider(**options), layout).submit(NAME, ENDLESS)


def test_a_job_is_found_by_name_by_a_provider_that_never_saw_it(slurm: VirtualSlurm, layout: Layout) -> None:
    block = submitted(scheduler_for(slurm_provider(), layout), NAME)
    later = scheduler_for(slurm_provider(), layout)
    assert later.find(NAME) == block.job
    assert later.find("gw-node-0000000") is None  # the beginning of a name is not the name
    reaches(later, block, BlockPhase.RUNNING)
    later.cancel(block, forced=False)
    reaches(later, block, BlockPhase.CANCELLED)
    again = scheduler_for(slurm_provider(), layout)
    assert again.find(NAME) == block.job  # over, and still the answer to "was it there?"


def test_a_job_that_is_another_by_now_is_left_alone_and_ours_is_lost(slurm: VirtualSlurm, layout: Layout) -> None:
    now = 0.0
    jobs = SlurmScheduler(slurm_provider(), layout.block_scripts, layout, clock=lambda: now)
    other = submitted(jobs, "gw-node-00000002")
    reaches(jobs, other, BlockPhase.RUNNING)
    assert other.job is not None
    ours = replace(other, name=NAME, job=Job(id=other.job.id, script=f"{layout.block_scripts}/{NAME}.1.2"))
    never = replace(other, name="gw-node-00000003", job=Job(id="999999"))
    assert jobs.status([ours, never]) == {}  # absence is not an end
    jobs.cancel(ours, forced=True)
    now = GONE_AFTER_S + 1
    seen = jobs.status([ours, never, other])
    assert {name: found.phase for name, found in seen.items()} == {
        ours.name: BlockPhase.LOST,
        never.name: BlockPhase.LOST,
        other.name: BlockPhase.RUNNING,
    }


def test_what_the_controller_forgot_accounting_knows(slurm: VirtualSlurm, layout: Layout) -> None:
    jobs = scheduler_for(slurm_provider(), layout)
    block = submitted(jobs, NAME, "exit 3")
    reaches(jobs, block, BlockPhase.FAILED)
    assert block.job is not None
    job_id = block.job.id
    wait_for(lambda: "FAILED" in slurm.run("sacct", "-X", "-n", "-j", job_id), "accounting", timeout_s=20)
    slurm.stop_controller()
    slurm.start_controller("-c")  # it begins with an empty memory
    assert job_id not in slurm.run("squeue", "-h", "-t", "all", "-o", "%A").split()
    seen = reaches(scheduler_for(slurm_provider(), layout), block, BlockPhase.FAILED)
    assert (seen.reason or "").startswith("its script left with exit code 3")


def test_a_controller_that_is_away_is_silence_and_back_it_is_the_same_job(slurm: VirtualSlurm, layout: Layout) -> None:
    jobs = scheduler_for(slurm_provider(), layout)
    pool = BlockPool(Ledger(layout.ledger), {"node": jobs}, {"node": 3})
    block = pool.submit(NAME, "node", ENDLESS, {})
    doubt = replace(block, name="gw-node-00000002", phase=BlockPhase.SUBMITTING, job=None)
    reaches(jobs, block, BlockPhase.RUNNING)
    slurm.stop_controller()
    try:
        with ThreadPoolExecutor() as at_once:  # each waits as long as Slurm's commands do, 9 to 18 s
            looked = at_once.submit(jobs.status, [block])
            found = at_once.submit(jobs.find, NAME)
            told = at_once.submit(jobs.cancel, replace(block, name="gw-node-00000009"), False)
            refused = at_once.submit(jobs.submit, "gw-node-00000003", ENDLESS)
            # One in doubt that cannot be looked for does not hide the others, and is not given up.
            later = BlockPool(Ledger(layout.ledger), {"node": jobs}, {"node": 3}, monotonic=lambda: 0.0)
            later._blocks[doubt.name] = doubt
            held = at_once.submit(later.refresh)
        assert looked.result() == {}
        assert told.result() is None
        assert isinstance(found.exception(), SchedulerSilent)
        assert isinstance(refused.exception(), ServiceError)
        assert "Unable to contact slurm controller" in str(refused.exception())
        assert {kept.name: kept.phase for kept in held.result()} == {
            block.name: BlockPhase.PENDING,
            doubt.name: BlockPhase.SUBMITTING,
        }
    finally:
        slurm.start_controller()
    reaches(jobs, block, BlockPhase.RUNNING)
    assert jobs.find(NAME) == block.job
    assert slurm.run("squeue", "-h", "-o", "%A").split() == [block.job and block.job.id]
