"""Slurm's words, as it says them; and what they mean for a block."""

from __future__ import annotations

from pathlib import Path

import pytest
from parsl.launchers import SimpleLauncher, SrunLauncher
from parsl.providers import SlurmProvider

from gateway_plugin.blocks.ledger import BlockPhase
from gateway_plugin.errors import ConfigError
from gateway_plugin.paths import Layout
from gateway_plugin.schedulers import slurm_cli as words
from gateway_plugin.schedulers.base import JobStatus
from gateway_plugin.schedulers.queue import belongs_to
from gateway_plugin.schedulers.select import scheduler_for
from gateway_plugin.schedulers.slurm import SlurmScheduler

QUEUE = """\
CLUSTER: virtual
2|PENDING|Resources||1795367657|1795368257|gw-gpu-0a1b2c3d.1790000.5
8|PENDING|PartitionTimeLimit||N/A|N/A|gw-gpu-4.17.5
1|RUNNING|None|n1|1795367557|1795368157|somebody's | job
"""
RECORD = (
    "JobId=6 JobName=gw-gpu-6.1.2 UserId=root(0) JobState=FAILED Reason=NonZeroExitCode Requeue=0 ExitCode=3:0 "
    "StartTime=1795367557 EndTime=1795367559 NodeList=n2 Command=(null) TresPerNode=gres:gpu:1 \n"
)
ACCOUNTING = """\
7|CANCELLED by 1000|None|None assigned|None|1795367559|0:0|gw-gpu-7.1.2
9|NODE_FAIL|None|n2|1795367834|1795367836|0:0|gw-gpu-9.1.2
"""


def test_a_queue_is_read() -> None:
    waits, never, runs = words.parse_queue(QUEUE)
    assert words.status_in(waits) == JobStatus(BlockPhase.PENDING, "Resources", starts_at=1795367657.0)
    assert words.status_in(never) == JobStatus(BlockPhase.PENDING, "PartitionTimeLimit", never_clears=True)
    assert words.status_in(runs) == JobStatus(BlockPhase.RUNNING, None, "n1", 1795367557.0, 1795368157.0)
    assert runs.name == "somebody's | job"


def test_a_record_and_accounting_are_read() -> None:
    row = words.parse_record(RECORD)
    assert row is not None
    seen = words.status_in(row)
    assert seen == JobStatus(
        BlockPhase.FAILED, "its script left with exit code 3 on n2", "n2", 1795367557.0, 1795367559.0
    )
    assert words.parse_record("slurm_load_jobs error: Invalid job id specified") is None
    cancelled, failed = (words.status_in(row) for row in words.parse_accounting(ACCOUNTING))
    assert cancelled == JobStatus(BlockPhase.CANCELLED, "cancelled (by user 1000)", ends_at=1795367559.0)
    assert failed is not None
    assert (failed.phase, failed.reason) == (BlockPhase.LOST, "its node failed on n2")


def test_accounting_may_have_lost_a_short_jobs_name() -> None:
    (row,) = words.parse_accounting("1|FAILED|None|n1|1795369004|1795369004|3:0|allocation\n")
    assert words.nameless(row)
    assert not words.nameless(words.parse_accounting(ACCOUNTING)[0])


@pytest.mark.parametrize(
    ("state", "phase"),
    [
        ("CONFIGURING", BlockPhase.PENDING),
        ("REQUEUED", BlockPhase.PENDING),
        ("COMPLETING", BlockPhase.RUNNING),
        ("SUSPENDED", BlockPhase.RUNNING),
        ("COMPLETED", BlockPhase.COMPLETED),
        ("CANCELLED", BlockPhase.CANCELLED),
        ("TIMEOUT", BlockPhase.EXPIRED),
        ("DEADLINE", BlockPhase.EXPIRED),
        ("OUT_OF_MEMORY", BlockPhase.FAILED),
        ("BOOT_FAIL", BlockPhase.FAILED),
        ("NODE_FAIL", BlockPhase.LOST),
        ("PREEMPTED", BlockPhase.LOST),
    ],
)
def test_every_state_means_something(state: str, phase: BlockPhase) -> None:
    seen = words.status_in(words.Row("1", "gw-a-1.2.3", state, reason="None of ours", node="n1"))
    assert seen is not None
    assert seen.phase is phase
    assert seen.reason is not None or phase is BlockPhase.COMPLETED


def test_a_job_that_slurm_holds_says_why() -> None:
    held = words.Row("1", "gw-a-1.2.3", "REQUEUE_HOLD", reason="launch failed requeued held")
    assert words.status_in(held) == JobStatus(BlockPhase.PENDING, "launch failed requeued held", never_clears=True)
    bare = words.status_in(words.Row("1", "gw-a-1.2.3", "REQUEUE_HOLD"))
    assert bare == JobStatus(BlockPhase.PENDING, "requeue_hold", never_clears=True)


def test_of_a_state_that_slurm_has_not_got_yet_nothing_can_be_said() -> None:
    assert words.status_in(words.Row("1", "gw-a-1.2.3", "TELEPORTED")) is None


def test_why_a_cancelled_job_had_been_waiting_is_not_why_it_was_cancelled() -> None:
    seen = words.status_in(words.Row("1", "gw-a-1.2.3", "CANCELLED", reason="Priority"))
    assert seen == JobStatus(BlockPhase.CANCELLED, "cancelled")


def test_a_script_ended_by_a_signal_says_so() -> None:
    seen = words.status_in(words.Row("1", "gw-a-1.2.3", "FAILED", node="n1", exit_code="0:9"))
    assert seen == JobStatus(BlockPhase.FAILED, "its script was ended by signal 9 on n1", "n1")


def test_the_users_environment_does_not_bend_an_answer() -> None:
    asked = words.environment({"PATH": "/bin", "SQUEUE_STATES": "RUNNING", "SACCT_FORMAT": "jobid", "SLURM_CONF": "/c"})
    assert asked == {"PATH": "/bin", "SLURM_CONF": "/c", "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"}


def test_commands() -> None:
    assert words.cancel_argv("7", "gw-a-1.2.3", False) == ("scancel", "--name=gw-a-1.2.3", "7")
    assert words.cancel_argv("7", None, True, "x") == ("scancel", "--clusters=x", "--signal=KILL", "--full", "7")
    assert words.queue_argv(1000)[:7] == ("squeue", "--noheader", "--all", "-t", "all", "-u", "1000")
    assert words.accounting_argv(["1", "2"])[4:6] == ("-j", "1,2")
    assert words.record_argv("7")[-3:] == ("show", "job", "7")


def test_a_blocks_name_is_never_the_beginning_of_anothers() -> None:
    assert belongs_to("gw-gpu-0a1b2c3d.1790000.5", "gw-gpu-0a1b2c3d")
    assert not belongs_to("gw-gpu-0a1b2c3d.1790000.5", "gw-gpu-0a1b2c3")


@pytest.mark.parametrize(
    ("code", "said", "sure"),
    [
        (1, "sbatch: error: Batch job submission failed: Invalid partition name specified", True),
        (1, "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", True),
        (1, "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", False),
        (1, "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received", False),
        (1, "sbatch: error: Batch job submission failed: Unable to contact slurm controller (receive failure)", False),
        (0, "", False),
        (None, "", False),
    ],
)
def test_a_submit_is_only_taken_for_refused_if_there_is_no_job(code: int | None, said: str, sure: bool) -> None:
    assert words.surely_refused(code, said) is sure


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "state")
    layout.state.mkdir()
    layout.blocks.mkdir()
    return layout


@pytest.mark.process
def test_a_provider_is_made_fit_for_blocks_once(layout: Layout) -> None:
    provider = SlurmProvider(launcher=SimpleLauncher())
    for _ in range(2):  # asked for by pool, down and status, of the same site
        assert isinstance(scheduler_for(provider, layout), SlurmScheduler)
    assert provider.scheduler_options.count("--no-requeue") == 1
    assert provider.cmd_timeout == 30
    assert provider.script_dir == str(layout.block_scripts)


@pytest.mark.process
@pytest.mark.parametrize("option", ["--job-name=mine", "-J mine", "--array=1-3", "-M other", "-N 4"])
def test_an_option_that_would_hide_the_job_is_refused(layout: Layout, option: str) -> None:
    provider = SlurmProvider(launcher=SimpleLauncher(), scheduler_options=f"#SBATCH --mail-type=END\n#SBATCH {option}")
    with pytest.raises(ConfigError, match=option.split("=")[0].split(" ")[0]):
        scheduler_for(provider, layout)


@pytest.mark.process
def test_a_launcher_that_runs_the_script_in_its_own_way_is_refused(layout: Layout) -> None:
    with pytest.raises(ConfigError, match="SrunLauncher"):
        scheduler_for(SlurmProvider(launcher=SrunLauncher()), layout)


@pytest.mark.process
def test_a_state_folder_that_parsl_would_not_quote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quote"):
        scheduler_for(SlurmProvider(launcher=SimpleLauncher()), Layout(tmp_path / "my state"))
