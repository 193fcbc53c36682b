"""``PbsScheduler`` on a stand-in for PBS: how a job waits, runs and ends; what Parsl says; a server that is away."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from parsl.jobs.states import JobState
from parsl.launchers import SimpleLauncher
from parsl.providers import PBSProProvider

from gateway_plugin.blocks.ledger import Block, BlockPhase
from gateway_plugin.errors import ConfigError, ServiceError
from gateway_plugin.paths import Layout, block_log
from gateway_plugin.schedulers.base import Scheduler, SchedulerSilent
from gateway_plugin.schedulers.pbs import FORCE_AFTER_S, PbsScheduler
from gateway_plugin.schedulers.queue import GONE_AFTER_S, TELL_AGAIN_S
from gateway_plugin.schedulers.select import scheduler_for
from tests.support.clusters import wait_for
from tests.support.pbs.virtual import VirtualPbs
from tests.support.slurm.blocks import ENDLESS, look, reaches, submitted

FIRST, SECOND, THIRD = "gw-node-00000001", "gw-node-00000002", "gw-node-00000003"


def provider(**options: Any) -> PBSProProvider:
    return PBSProProvider(**{"launcher": SimpleLauncher(), "queue": "workq", "walltime": "00:05:00", **options})


def running(jobs: Scheduler, layout: Layout, name: str, on_sigterm: str = "exit 0") -> Block:
    """A block whose script runs, and by now does this at SIGTERM."""
    up = layout.run / name
    script = f"trap '{on_sigterm}' TERM; touch {up}; while true; do sleep 0.1 & wait $!; done"
    block = submitted(jobs, name, script)
    reaches(jobs, block, BlockPhase.RUNNING)
    wait_for(up.exists, "its trap", timeout_s=10)
    return block


def test_a_job_waits_with_a_reason_and_runs_until_its_walltime(pbs: VirtualPbs, layout: Layout) -> None:
    pbs.set(slots=1)
    jobs = scheduler_for(provider(), layout)
    first, second = submitted(jobs, FIRST), submitted(jobs, SECOND)
    seen = reaches(jobs, first, BlockPhase.RUNNING)
    assert (seen.node, seen.reason) == ("node1", None)
    assert seen.starts_at is not None
    assert seen.ends_at == seen.starts_at + 300
    assert abs(seen.starts_at - time.time()) < 30
    wait_for(lambda: (seen := look(jobs, second)) and seen.starts_at, "the queue's estimate", timeout_s=10)
    seen = jobs.status([first, second])[second.name]
    assert seen.phase is BlockPhase.PENDING
    assert seen.reason == "Not Running: Insufficient amount of resource: ngpus"
    assert seen.starts_at is not None
    assert 500 < seen.starts_at - time.time() < 700
    jobs.cancel(second, forced=False)
    assert reaches(jobs, second, BlockPhase.CANCELLED).node is None
    assert pbs.jobs()["1"]["Rerunable"] == "False"


def test_how_a_job_ended_is_told_with_its_last_words(pbs: VirtualPbs, layout: Layout) -> None:
    jobs = scheduler_for(provider(), layout)
    block = submitted(jobs, FIRST, f"echo no such module >{block_log(layout, FIRST)}; exit 3")
    seen = reaches(jobs, block, BlockPhase.FAILED)
    assert seen.reason == "its script left with exit code 3 on node1: no such module"
    killed = submitted(jobs, SECOND, "kill -9 $$")
    assert (reaches(jobs, killed, BlockPhase.FAILED).reason or "").startswith("its script was ended by signal 9")
    expired = submitted(scheduler_for(provider(walltime="00:00:01"), layout), THIRD, "sleep 60")
    assert reaches(jobs, expired, BlockPhase.EXPIRED).reason == "its walltime ended on node1"


def test_deleted_by_somebody_else_is_cancelled(pbs: VirtualPbs, layout: Layout) -> None:
    jobs = scheduler_for(provider(), layout)
    block = running(jobs, layout, FIRST, "exit 143")
    pbs.run("qdel", "1")
    assert reaches(jobs, block, BlockPhase.CANCELLED).reason == "deleted on node1"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"queue": "nope"}, "qsub: Unknown queue"),
        ({"walltime": "48:00:00"}, "Job violates queue and/or server resource limits"),
        ({"queue": "prod"}, "Job violates queue and/or server resource limits"),
    ],
)
def test_a_refusal_is_in_qsubs_own_words(
    pbs: VirtualPbs, layout: Layout, options: dict[str, object], said: str
) -> None:
    with pytest.raises(ServiceError, match=f"block {FIRST} was refused by PBS: .*{said}"):
        scheduler_for(provider(**options), layout).submit(FIRST, ENDLESS)
    assert pbs.jobs() == {}


def test_a_job_is_found_by_name_by_a_provider_that_never_saw_it(pbs: VirtualPbs, layout: Layout) -> None:
    block = running(scheduler_for(provider(), layout), layout, FIRST)
    later = scheduler_for(provider(), layout)
    assert later.find(FIRST) == block.job
    assert later.find(FIRST[:-1]) is None  # the beginning of a name is not the name
    reaches(later, block, BlockPhase.RUNNING)
    later.cancel(block, forced=False)
    reaches(later, block, BlockPhase.COMPLETED)  # its script left in peace
    assert scheduler_for(provider(), layout).find(FIRST) == block.job  # over, and still the answer to "was it there?"


def test_a_job_that_is_another_by_now_is_left_alone_and_ours_is_lost(pbs: VirtualPbs, layout: Layout) -> None:
    now = 0.0
    jobs = PbsScheduler(provider(), layout.block_scripts, layout, clock=lambda: now)
    other = submitted(jobs, SECOND)
    reaches(jobs, other, BlockPhase.RUNNING)
    assert other.job is not None
    ours = replace(other, name=FIRST, job=replace(other.job, script=f"{layout.block_scripts}/{FIRST}.1.2"))
    never = replace(other, name=THIRD, job=replace(other.job, id="999999.standin"))
    outlived = replace(never, name="gw-node-00000004", ends_at=time.time() - 1)
    assert jobs.status([ours, never]) == {}  # absence is not an end
    jobs.status([outlived])
    jobs.cancel(ours, forced=True)
    now = GONE_AFTER_S + 1
    seen = jobs.status([ours, never, other, outlived])
    assert {name: found.phase for name, found in seen.items()} == {
        ours.name: BlockPhase.LOST,
        never.name: BlockPhase.LOST,
        other.name: BlockPhase.RUNNING,
        outlived.name: BlockPhase.EXPIRED,
    }


def test_a_server_that_is_away_is_silence_and_back_it_is_the_same_job(pbs: VirtualPbs, layout: Layout) -> None:
    jobs = scheduler_for(provider(), layout)
    block = running(jobs, layout, FIRST)
    pbs.set(away=True)
    assert jobs.status([block]) == {}
    jobs.cancel(block, forced=False)
    with pytest.raises(SchedulerSilent, match="qselect: qselect: cannot connect to server"):
        jobs.find(FIRST)
    with pytest.raises(ServiceError, match="cannot connect to server"):
        jobs.submit(SECOND, ENDLESS)
    pbs.set(away=False)
    reaches(jobs, block, BlockPhase.RUNNING)
    jobs.cancel(block, forced=False)  # what nobody heard is said again at once
    reaches(jobs, block, BlockPhase.COMPLETED)


def test_a_server_that_keeps_no_history_is_asked_without(pbs: VirtualPbs, layout: Layout) -> None:
    pbs.set(history=False)
    now = 0.0
    jobs = PbsScheduler(provider(), layout.block_scripts, layout, clock=lambda: now)
    block = submitted(jobs, FIRST)
    reaches(jobs, block, BlockPhase.RUNNING)
    assert PbsScheduler(provider(), layout.block_scripts, layout).find(FIRST) == block.job
    jobs.cancel(block, forced=False)
    wait_for(lambda: pbs.jobs()["1"]["job_state"] == "F", "the job's end", timeout_s=10)
    assert jobs.status([block]) == {}
    now = GONE_AFTER_S + 1
    assert jobs.status([block])[FIRST].phase is BlockPhase.LOST


def test_force_is_used_only_after_a_minute_of_asking(pbs: VirtualPbs, layout: Layout) -> None:
    pbs.set(kill_delay_s=1000)
    now = 0.0
    jobs = PbsScheduler(provider(), layout.block_scripts, layout, clock=lambda: now)
    block = running(jobs, layout, FIRST, "")
    jobs.cancel(block, forced=True)
    now += TELL_AGAIN_S + 1
    jobs.cancel(block, forced=True)
    assert look(jobs, block) is not None
    assert pbs.jobs()["1"]["job_state"] == "R"
    now += FORCE_AFTER_S
    jobs.cancel(block, forced=True)
    reaches(jobs, block, BlockPhase.CANCELLED)


def test_parsl_s_own_answers(pbs: VirtualPbs, layout: Layout) -> None:
    """Each of these is why we ask ourselves. One that fails because Parsl has become right is good news."""
    theirs = provider()
    jobs = scheduler_for(theirs, layout)
    fails = submitted(jobs, FIRST, "exit 3")
    assert fails.job is not None
    with pytest.raises(ValueError, match=r"Invalid \\escape|delimiter"):  # (1) a job's environment is not JSON
        theirs.status([fails.job.id])
    reaches(jobs, fails, BlockPhase.FAILED)
    pbs.forget()
    (status,) = theirs.status([fails.job.id])
    assert status.state is JobState.PENDING  # (2) one job that PBS has forgotten, and nothing is said of any
    with pytest.raises(KeyError):  # (3) a job of an earlier process
        provider().status([fails.job.id])


def test_what_else_qsub_says_is_no_job(pbs: VirtualPbs, layout: Layout) -> None:
    pbs.set(banner="Your project has 17 node hours left.\n")
    theirs = provider()
    jobs = scheduler_for(theirs, layout)
    job = jobs.submit(FIRST, ENDLESS)
    assert job.id == "1.standin-pbs-01"
    assert len(theirs.resources) == 2  # Parsl took both lines for jobs


def test_a_prefix_for_directives_of_the_user_s_own_is_not_ours(
    pbs: VirtualPbs, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PBS_DPREFIX", "#QSUB")
    scheduler_for(provider(walltime="00:07:00"), layout).submit(FIRST, ENDLESS)
    assert pbs.jobs()["1"]["Resource_List"]["walltime"] == "00:07:00"


def test_what_no_block_can_be_is_refused(layout: Layout) -> None:
    with pytest.raises(ConfigError, match="SimpleLauncher"):
        scheduler_for(PBSProProvider(), layout)
    with pytest.raises(ConfigError, match="-N: the gateway's"):
        scheduler_for(provider(scheduler_options="#PBS -N mine"), layout)


def test_options_of_the_site_are_kept_and_rerunning_is_off(layout: Layout) -> None:
    plain, asked = provider(scheduler_options="#PBS -l filesystems=home"), provider(scheduler_options="#PBS -r n -V")
    for each in (plain, plain, asked):
        scheduler_for(each, layout)
    assert plain.scheduler_options == "#PBS -l filesystems=home\n#PBS -r n"
    assert asked.scheduler_options == "#PBS -r n -V"
    assert plain.cmd_timeout == 120
