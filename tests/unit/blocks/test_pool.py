from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_plugin.blocks.ledger import Block, BlockPhase, Job, Ledger
from gateway_plugin.blocks.pool import CANCEL_GRACE_S, SPACING_S, BlockPool, after_look, after_search
from gateway_plugin.blocks.stop_files import CancelRequests
from gateway_plugin.errors import ServiceError
from gateway_plugin.schedulers.base import JobStatus
from tests.support.queue import QueueJobs, QueueProvider, Scheduler

NAME = "gw-a-1"
BLOCK = Block(name=NAME, type="a", phase=BlockPhase.RUNNING, asked_at=0.0, job=Job("7"))
phases = st.sampled_from(BlockPhase)


@given(phases, phases.filter(lambda p: p is not BlockPhase.SUBMITTING))
def test_the_first_end_stays(before: BlockPhase, seen: BlockPhase) -> None:
    block = replace(BLOCK, phase=before)
    after = after_look(block, JobStatus(seen), now=5.0)
    if before.ended:
        assert after == block
    elif before is BlockPhase.CANCELLING:
        assert after.phase is (BlockPhase.CANCELLED if seen.ended else BlockPhase.CANCELLING)
    else:
        assert after.phase is seen
    assert (after.ended_at is not None) == (after.phase.ended and not before.ended)


def test_silence_is_not_an_end() -> None:
    assert after_look(BLOCK, None, now=5.0) == BLOCK


def test_a_block_in_doubt_is_searched_before_it_is_given_up() -> None:
    doubt = replace(BLOCK, phase=BlockPhase.SUBMITTING, job=None)
    assert after_search(doubt, Job("9"), 0.0, 30.0, 1.0).job == Job("9")
    assert after_search(doubt, None, 29.0, 30.0, 1.0) == doubt
    assert after_search(doubt, None, 30.0, 30.0, 1.0).phase is BlockPhase.LOST
    told = replace(doubt, phase=BlockPhase.CANCELLING)
    assert after_search(told, Job("9"), 0.0, 30.0, 1.0).phase is BlockPhase.CANCELLING


class Story:
    """A pool over a fake queue with a clock in hand."""

    def __init__(self, folder: Path) -> None:
        self.now = 1_000_000.0
        self.set_by = 0.0
        """By so much the wall clock was set."""
        self.scheduler = Scheduler()
        self.ledger = Ledger(folder / "ledger.json")
        self.marks = folder / "leave"
        self.marks.mkdir()
        self.pool = self.new_pool()

    def new_pool(self) -> BlockPool:
        jobs = QueueJobs(QueueProvider(self.scheduler))
        return BlockPool(self.ledger, {"a": jobs}, {"a": 4}, self.clock, self.marks, monotonic=self.monotonic)

    def clock(self) -> float:
        return self.now + self.set_by

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def test_a_refused_submit_says_what_the_scheduler_said(story: Story) -> None:
    story.scheduler.refuse = "invalid partition specified: gpus"
    with pytest.raises(ServiceError, match="invalid partition"):
        story.pool.submit(NAME, "a", "", {})
    block = story.ledger.read()[NAME]
    assert block.phase is BlockPhase.FAILED
    assert block.reason is not None
    assert "invalid partition" in block.reason
    assert story.pool.holding() == ()


def test_a_submit_that_timed_out_is_searched_and_not_repeated(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = QueueJobs.submit

    def cut_short(self: QueueJobs, name: str, script: str) -> Job:
        submit(self, name, script)
        raise TimeoutError("sbatch did not answer")

    monkeypatch.setattr(QueueJobs, "submit", cut_short)
    with pytest.raises(TimeoutError):
        story.pool.submit(NAME, "a", "", {})
    assert story.ledger.read()[NAME].reason == "TimeoutError: sbatch did not answer"
    (block,) = story.pool.refresh()
    assert (block.phase, block.job, block.reason) == (BlockPhase.PENDING, Job("1001"), None)


def test_a_submit_that_broke_and_left_no_job_keeps_the_words(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: QueueJobs, name: str, script: str) -> Job:
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr(QueueJobs, "submit", broken)
    with pytest.raises(ValueError, match="unpack"):
        story.pool.submit(NAME, "a", "", {})
    story.now += QueueJobs.in_doubt_s
    assert story.pool.refresh() == ()
    block = story.ledger.read()[NAME]
    said = "its submit was cut short (ValueError: not enough values to unpack) and no job of its name was found"
    assert (block.phase, block.reason) == (BlockPhase.LOST, said)


def test_a_cancel_during_the_submit_reaches_the_job(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = QueueJobs.submit

    def meanwhile(self: QueueJobs, name: str, script: str) -> Job:
        assert story.ledger.read()[name].phase is BlockPhase.SUBMITTING  # written down before there is a job
        story.pool.cancel([name])
        return submit(self, name, script)

    monkeypatch.setattr(QueueJobs, "submit", meanwhile)
    assert story.pool.submit(NAME, "a", "", {}).phase is BlockPhase.CANCELLING
    story.pool.refresh()
    story.pool.refresh()
    assert story.ledger.read()[NAME].phase is BlockPhase.CANCELLED


def test_a_silent_scheduler_changes_nothing(story: Story) -> None:
    story.pool.submit(NAME, "a", "", {})
    story.scheduler.move(NAME, BlockPhase.RUNNING)
    (running,) = story.pool.refresh()
    story.scheduler.silent = True
    story.now += 86400
    assert story.pool.refresh() == (running,)
    assert story.new_pool().refresh() == (running,)


def test_a_block_in_doubt_that_cannot_be_looked_for_hides_no_other_and_is_not_given_up(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    story.pool.submit(NAME, "a", "", {})
    story.scheduler.move(NAME, BlockPhase.RUNNING)
    doubt = Block(name="gw-a-2", type="a", phase=BlockPhase.SUBMITTING, asked_at=story.now)
    story.ledger.write({**story.ledger.read(), doubt.name: doubt})

    def silent(self: QueueJobs, name: str) -> Job | None:
        raise ServiceError("the controller does not answer")

    pool = story.new_pool()
    with monkeypatch.context() as away:
        away.setattr(QueueJobs, "find", silent)
        story.now += 86400
        phases = {block.name: block.phase for block in pool.refresh()}
    assert phases == {NAME: BlockPhase.RUNNING, doubt.name: BlockPhase.SUBMITTING}
    assert [block.name for block in pool.refresh()] == [NAME]  # it answers, and there is none


def test_where_and_until_when_a_block_runs_is_kept() -> None:
    pending = after_look(BLOCK, JobStatus(BlockPhase.PENDING, "Resources", starts_at=70.0), now=5.0)
    assert (pending.reason, pending.node, pending.starts_at, pending.ends_at) == ("Resources", None, 70.0, None)
    running = after_look(pending, JobStatus(BlockPhase.RUNNING, None, "n1", 60.0, 360.0), now=65.0)
    assert (running.reason, running.node, running.starts_at, running.ends_at) == (None, "n1", 60.0, 360.0)
    ended = after_look(running, JobStatus(BlockPhase.EXPIRED, "its walltime ended", "n1", 60.0, 361.0), now=400.0)
    assert (ended.node, ended.starts_at, ended.ended_at) == ("n1", 60.0, 400.0)


def test_a_block_carries_the_flag_of_a_pending_reason_that_never_clears() -> None:
    stuck = after_look(BLOCK, JobStatus(BlockPhase.PENDING, "PartitionTimeLimit", never_clears=True), now=5.0)
    assert stuck.never_clears
    assert not after_look(stuck, JobStatus(BlockPhase.PENDING, "Priority"), now=9.0).never_clears


def test_what_was_expected_of_a_job_that_never_ran_is_not_taken_for_its_start() -> None:
    pending = after_look(BLOCK, JobStatus(BlockPhase.PENDING, "Priority", starts_at=9e5), now=5.0)
    told = pending.told_to_end()
    assert (told.phase, told.starts_at) == (BlockPhase.CANCELLING, None)
    # squeue calls the moment of a cancellation the start of a job that never had a node
    cancelled = after_look(told, JobStatus(BlockPhase.CANCELLED, "cancelled", starts_at=9.0), now=10.0)
    assert (cancelled.phase, cancelled.starts_at) == (BlockPhase.CANCELLED, None)
    by_others = after_look(pending, JobStatus(BlockPhase.CANCELLED, "by user 7", starts_at=9.0), now=10.0)
    assert (by_others.phase, by_others.starts_at) == (BlockPhase.CANCELLED, None)
    lost = after_look(pending, JobStatus(BlockPhase.LOST), now=10.0)
    assert (lost.phase, lost.starts_at) == (BlockPhase.LOST, None)


def test_a_job_that_ran_keeps_its_start_however_it_ended() -> None:
    running = after_look(BLOCK, JobStatus(BlockPhase.RUNNING, None, "n1", 60.0, 360.0), now=65.0)
    ended = after_look(running.told_to_end(), JobStatus(BlockPhase.CANCELLED, "cancelled"), now=70.0)
    assert (ended.node, ended.starts_at) == ("n1", 60.0)
    pending = after_look(BLOCK, JobStatus(BlockPhase.PENDING, "Priority", starts_at=9e5), now=5.0)
    for block in (pending, pending.told_to_end()):  # it started after the last look
        ended = after_look(block, JobStatus(BlockPhase.FAILED, "exit code 1", "n1", 60.0), now=70.0)
        assert (ended.node, ended.starts_at) == ("n1", 60.0)


def test_a_block_that_is_told_to_end_in_the_queue_forgets_its_expected_start(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    story.pool.submit(NAME, "a", "", {})
    estimate = JobStatus(BlockPhase.PENDING, "Priority", starts_at=story.now + 432000)

    def status(jobs: QueueJobs, blocks: Sequence[Block]) -> dict[str, JobStatus]:
        if story.pool.find(NAME) == blocks[0] and blocks[0].starts_at is not None:
            story.pool.cancel([NAME])  # while it is being looked at
        return {NAME: replace(estimate, starts_at=story.now + 500000)} if blocks[0].starts_at else {NAME: estimate}

    monkeypatch.setattr(QueueJobs, "status", status)
    (block,) = story.pool.refresh()
    assert (block.phase, block.starts_at) == (BlockPhase.PENDING, estimate.starts_at)
    (block,) = story.pool.refresh()
    assert (block.phase, block.starts_at) == (BlockPhase.CANCELLING, None)
    assert story.ledger.read()[NAME].starts_at is None


def test_a_block_that_does_not_end_is_pressed(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    pressed: list[bool] = []
    monkeypatch.setattr(QueueJobs, "cancel", lambda self, block, forced: pressed.append(forced))
    story.pool.submit(NAME, "a", "", {})
    story.pool.cancel([NAME])
    story.pool.refresh()
    story.now += CANCEL_GRACE_S + 1
    story.pool.refresh()
    assert pressed == [False, False, True]
    assert [block.phase for block in story.pool.holding()] == [BlockPhase.CANCELLING]  # it holds its place until gone


def test_unknown_names_are_left_alone(story: Story) -> None:
    story.pool.cancel(["head", "gw-a-none"])
    assert story.pool.find("head") is None


def test_a_block_that_was_asked_to_end_is_told_at_the_next_look_and_the_request_is_gone(
    story: Story, tmp_path: Path
) -> None:
    requests = CancelRequests(tmp_path / "cancel")
    pool = BlockPool(
        story.ledger,
        {"a": QueueJobs(QueueProvider(story.scheduler))},
        {"a": 4},
        story.clock,
        requests=requests,
        monotonic=story.monotonic,
    )
    pool.submit(NAME, "a", "", {})
    pool.submit("gw-a-2", "a", "", {})
    requests.ask(NAME)
    requests.ask("gw-a-unheard-of")
    assert stat.S_IMODE((tmp_path / "cancel" / NAME).stat().st_mode) == 0o600
    pool.refresh()
    assert story.ledger.read()[NAME].phase in (BlockPhase.CANCELLING, BlockPhase.CANCELLED)
    assert requests.names() == ()
    (left,) = pool.refresh()
    assert left.name == "gw-a-2"


def test_after_a_block_was_ended_by_hand_no_other_of_its_type_is_submitted_for_a_moment(
    story: Story, tmp_path: Path
) -> None:
    """Ray hears a moment later than we do that nobody needs it any more, and would ask for another one."""
    requests = CancelRequests(tmp_path / "cancel")
    jobs = QueueJobs(QueueProvider(story.scheduler))
    pool = BlockPool(
        story.ledger,
        {"a": jobs, "b": jobs},
        {"a": 4, "b": 4},
        story.clock,
        requests=requests,
        monotonic=story.monotonic,
    )
    pool.submit(NAME, "a", "", {})
    requests.ask(NAME)
    requests.ask("gw-b-unheard-of")
    pool.refresh()
    with pytest.raises(ServiceError, match="ended by hand; the next can be submitted in 10 s"):
        pool.submit("gw-a-2", "a", "", {})
    assert pool.find("gw-a-2") is None
    pool.submit("gw-b-1", "b", "", {})
    story.now += SPACING_S
    pool.submit("gw-a-2", "a", "", {})


def test_a_request_outlives_the_pool_that_did_not_read_it(story: Story, tmp_path: Path) -> None:
    story.pool.submit(NAME, "a", "", {})
    requests = CancelRequests(tmp_path / "cancel")
    requests.ask(NAME)
    later = BlockPool(
        story.ledger,
        {"a": QueueJobs(QueueProvider(story.scheduler))},
        {"a": 4},
        story.clock,
        requests=requests,
        monotonic=story.monotonic,
    )
    later.refresh()
    assert later.refresh() == ()
    assert story.ledger.read()[NAME].phase is BlockPhase.CANCELLED


def test_a_block_is_marked_before_its_job_is_told(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """So its script knows, when the signal comes, that it was the gateway."""
    marked = []
    monkeypatch.setattr(QueueJobs, "cancel", lambda jobs, block, forced: marked.append((story.marks / NAME).exists()))
    story.pool.submit(NAME, "a", "", {})
    assert not (story.marks / NAME).exists()
    story.pool.cancel([NAME])
    assert marked == [True]


@pytest.mark.parametrize(
    ("phase", "marked"), [(BlockPhase.LOST, True), (BlockPhase.CANCELLED, True), (BlockPhase.COMPLETED, False)]
)
def test_a_block_whose_job_was_ended_by_others_is_marked(story: Story, phase: BlockPhase, marked: bool) -> None:
    """Its script may live on, on a node whose slurmd died."""
    story.pool.submit(NAME, "a", "", {})
    story.scheduler.move(NAME, phase)
    story.pool.refresh()
    assert (story.marks / NAME).exists() is marked


def test_a_mark_that_cannot_be_put_stops_nothing(story: Story) -> None:
    story.pool.submit(NAME, "a", "", {})
    story.marks.rmdir()
    story.pool.cancel([NAME])
    assert story.ledger.read()[NAME].phase is BlockPhase.CANCELLING


STEPS = pytest.mark.parametrize("step_s", [3.0, 3600.0, -3600.0])


@STEPS
def test_a_block_that_does_not_end_is_pressed_in_time_though_the_clock_is_set(story: Story, step_s: float) -> None:
    story.pool.submit(NAME, "a", "", {})
    told: list[bool] = []
    jobs = story.pool._schedulers["a"]
    jobs.cancel = lambda block, forced: told.append(forced)  # type: ignore[method-assign]  # it does not end
    story.pool.cancel([NAME])
    story.set_by = step_s
    story.now += CANCEL_GRACE_S - 5
    story.pool.refresh()
    story.now += 10
    story.pool.refresh()
    assert told == [False, False, True]


@STEPS
def test_a_hold_ends_though_the_clock_is_set(story: Story, tmp_path: Path, step_s: float) -> None:
    requests = CancelRequests(tmp_path / "cancel")
    jobs = QueueJobs(QueueProvider(story.scheduler))
    pool = BlockPool(story.ledger, {"a": jobs}, {"a": 4}, story.clock, requests=requests, monotonic=story.monotonic)
    pool.submit(NAME, "a", "", {})
    requests.ask(NAME)
    pool.refresh()
    story.set_by = step_s
    story.now += SPACING_S - 1
    with pytest.raises(ServiceError, match="the next can be submitted in 1 s"):
        pool.submit("gw-a-2", "a", "", {})
    story.now += 1
    pool.submit("gw-a-2", "a", "", {})


@pytest.mark.parametrize(("lived_s", "spaced"), [(5, True), (100, False)])
@pytest.mark.parametrize("phase", [BlockPhase.FAILED, BlockPhase.LOST, BlockPhase.COMPLETED])
def test_after_an_early_failure_the_next_block_waits_a_while(
    story: Story, phase: BlockPhase, lived_s: float, spaced: bool
) -> None:
    story.pool.submit(NAME, "a", "", {})
    story.now += lived_s
    story.scheduler.move(NAME, phase)
    story.pool.refresh()
    if spaced and phase is not BlockPhase.COMPLETED:
        with pytest.raises(ServiceError, match="type a has just failed; the next can be submitted in 10 s"):
            story.pool.submit("gw-a-2", "a", "", {})
        story.now += SPACING_S
    story.pool.submit("gw-a-2", "a", "", {})


def test_the_next_block_can_be_had_after_the_clock_was_set_back(story: Story) -> None:
    story.scheduler.refuse = "no such partition"
    for number in range(5):
        with pytest.raises(ServiceError, match="no such partition"):
            story.pool.submit(f"gw-a-{number}", "a", "", {})
        story.now += 60
    story.scheduler.refuse = None
    story.set_by = -3600.0
    story.pool.submit(NAME, "a", "", {})


def full(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gateway_plugin.state_file.write_private", no_room)


def test_on_a_full_disk_no_block_is_asked_for_and_those_there_are_seen_to(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    story.pool.submit(NAME, "a", "", {})
    before = story.ledger.path.read_text()
    with monkeypatch.context() as filled:
        full(filled)
        with pytest.raises(ServiceError, match=r"ledger\.json cannot be written"):
            story.pool.submit("gw-a-2", "a", "", {})
        story.pool.tag(NAME, {"x": "y"})
        assert [block.name for block in story.pool.refresh()] == [NAME]
        story.pool.cancel([NAME])
        story.now += 5
        story.pool.refresh()
        assert story.ledger.path.read_text() == before
    story.pool.refresh()
    kept = story.ledger.read()
    assert set(kept) == {NAME}
    assert kept[NAME].phase in (BlockPhase.CANCELLING, BlockPhase.CANCELLED)
    assert kept[NAME].tags == {"x": "y"}


def test_what_is_known_of_blocks_that_ended_is_bounded(story: Story) -> None:
    for number in range(120):
        story.now += 100
        story.pool.refuse(f"gw-a-{number}", "a", "no such account", {})
    assert len(story.pool._blocks) == 50


def test_tags_that_are_there_are_not_written_again(story: Story) -> None:
    story.pool.submit(NAME, "a", "", {"x": "y"})
    before = story.ledger.path.stat().st_ino
    story.pool.tag(NAME, {"x": "y"})
    assert story.ledger.path.stat().st_ino == before
