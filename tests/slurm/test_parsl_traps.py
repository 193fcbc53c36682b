"""What Parsl's ``SlurmProvider`` says on a real Slurm, and what we say of the same job.

A test that fails because Parsl has become right is good news: then something in ``schedulers/slurm.py`` may go.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from parsl.jobs.states import JobState

from gateway_plugin.blocks.ledger import BlockPhase
from gateway_plugin.paths import Layout
from gateway_plugin.schedulers.select import scheduler_for
from tests.support.clusters import wait_for
from tests.support.slurm.blocks import ENDLESS, look, reaches, slurm_provider, submitted
from tests.support.slurm.configuration import Shape
from tests.support.slurm.virtual import VirtualSlurm, virtual_slurm

pytestmark = pytest.mark.slurm
FIRST, SECOND = "gw-node-00000001", "gw-node-00000002"


@pytest.fixture
def bare(slurm: VirtualSlurm, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> Iterator[VirtualSlurm]:
    """A site without accounting; ``layout`` and ``slurm`` are ended after it."""
    with virtual_slurm(Shape(nodes=1, namespaces=False, accounting=False)) as cluster:
        monkeypatch.setenv("SLURM_CONF", str(cluster.places.conf))
        yield cluster
    monkeypatch.setenv("SLURM_CONF", str(slurm.places.conf))


def in_accounting(slurm: VirtualSlurm, job_id: str, state: str) -> None:
    def there() -> bool:
        return state in slurm.run("sacct", "-X", "-n", "-j", job_id, "-o", "state%20")

    wait_for(there, f"job {job_id} {state} in accounting", timeout_s=20)


def test_parsl_takes_a_job_that_accounting_does_not_know_yet_for_completed(slurm: VirtualSlurm, layout: Layout) -> None:
    provider = slurm_provider()
    jobs = scheduler_for(provider, layout)
    block = submitted(jobs, FIRST)
    assert block.job is not None
    (first,) = provider.status([block.job.id])
    if first.state is not JobState.COMPLETED:
        pytest.skip("accounting was told before Parsl asked: the trap did not show this time")
    reaches(jobs, block, BlockPhase.RUNNING)
    in_accounting(slurm, block.job.id, "RUNNING")
    (still,) = provider.status([block.job.id])
    assert still.state is JobState.COMPLETED  # it sticks: a job that runs is forgotten
    reaches(jobs, block, BlockPhase.RUNNING)


def test_parsl_turns_a_failed_job_into_a_completed_one(slurm: VirtualSlurm, layout: Layout) -> None:
    provider = slurm_provider()
    jobs = scheduler_for(provider, layout)
    fails, runs = submitted(jobs, FIRST, "exit 3"), submitted(jobs, SECOND)
    assert fails.job is not None
    assert runs.job is not None
    in_accounting(slurm, fails.job.id, "FAILED")
    in_accounting(slurm, runs.job.id, "RUNNING")
    both = [fails.job.id, runs.job.id]
    assert [status.state for status in provider.status(both)] == [JobState.FAILED, JobState.RUNNING]
    assert [status.state for status in provider.status(both)] == [JobState.COMPLETED, JobState.RUNNING]
    for _ in range(2):
        assert reaches(jobs, fails, BlockPhase.FAILED).reason is not None


def test_parsl_without_accounting_calls_every_end_completed(bare: VirtualSlurm, layout: Layout) -> None:
    provider = slurm_provider()
    jobs = scheduler_for(provider, layout)
    fails, told = submitted(jobs, FIRST, "exit 3"), submitted(jobs, SECOND)
    assert fails.job is not None
    assert told.job is not None
    reaches(jobs, told, BlockPhase.RUNNING)
    bare.run("scancel", told.job.id)  # by somebody else
    assert reaches(jobs, fails, BlockPhase.FAILED).reason is not None
    assert (reaches(jobs, told, BlockPhase.CANCELLED).reason or "").startswith("cancelled")
    said = provider.status([fails.job.id, told.job.id])
    assert [status.state for status in said] == [JobState.COMPLETED, JobState.COMPLETED]


def test_parsl_knows_only_its_own_processes_jobs(slurm: VirtualSlurm, layout: Layout) -> None:
    block = submitted(scheduler_for(slurm_provider(), layout), FIRST)
    assert block.job is not None
    later = slurm_provider()
    jobs = scheduler_for(later, layout)
    for verb in (later.status, later.cancel):
        with pytest.raises(KeyError):
            verb([block.job.id])
    reaches(jobs, block, BlockPhase.CANCELLED)  # Parsl did cancel it, and then stumbled


def test_parsl_never_says_why_a_job_waits(slurm: VirtualSlurm, layout: Layout) -> None:
    provider = slurm_provider(partition="short", walltime="01:00:00")
    jobs = scheduler_for(provider, layout)
    block = submitted(jobs, FIRST)
    assert block.job is not None
    in_accounting(slurm, block.job.id, "PENDING")
    wait_for(lambda: (seen := look(jobs, block)) and seen.reason == "PartitionTimeLimit", "the reason", timeout_s=15)
    (status,) = provider.status([block.job.id])
    assert (status.state, status.message) == (JobState.PENDING, None)


def test_parsl_does_not_submit_without_an_executors_script_folder(slurm: VirtualSlurm, layout: Layout) -> None:
    provider = slurm_provider()
    with pytest.raises(AssertionError, match="script_dir"):
        provider.submit(ENDLESS, 1, FIRST)
    assert provider.cmd_timeout == 10
    submitted(scheduler_for(provider, layout), FIRST)
    assert provider.cmd_timeout == 30
