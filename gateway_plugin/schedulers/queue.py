"""Common part of the batch queues: Parsl submits; everything else is queried from the scheduler here.

Parsl's own status is not used (each reason has a test in ``tests/slurm/test_parsl_traps.py`` and ``tests/pbs``): it
takes absence for completion, forgets a job's end on the next poll, tracks only the jobs of its own process, and gives
no reasons. The job's name contains the block's, by which it is found again. ``slurm.py`` and ``pbs.py`` supply the
commands.
"""

from __future__ import annotations

import logging
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from parsl.launchers import SimpleLauncher
from parsl.providers.errors import SchedulerMissingArgs, ScriptPathError, SubmitException

from gateway_plugin.blocks.ledger import Block, Job
from gateway_plugin.errors import ConfigError, ServiceError
from gateway_plugin.paths import Layout, block_log
from gateway_plugin.phases import BlockPhase
from gateway_plugin.schedulers.base import JobStatus, PollLimiter, SchedulerSilent, last_words
from gateway_plugin.schedulers.queue_reader import Answer, QueueReader, Row, Rows

log = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 30
"""A busy controller needs more than Parsl's 10 s; if it is down, the commands give up after 9 to 18 s."""

GONE_AFTER_S = 30.0
"""How long the scheduler must report a job as unknown before the job counts as gone."""

TELL_AGAIN_S = 15.0
"""Interval at which a job that does not end is cancelled again."""

_KEPT = 1000


class QueueScheduler(ABC):
    """``Scheduler`` of a queue's provider. ``scripts``: a folder on the shared file system, a path without quoting."""

    kind: ClassVar[str]
    """Its name in messages: ``Slurm``."""

    in_doubt_s = 120.0
    """An interrupted submit command continues by itself, for Slurm's ``MessageTimeout`` (10 s to 100 s)."""

    def __init__(
        self, provider: Any, scripts: Path, layout: Layout, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepare ``provider`` for blocks. Raises ``ConfigError`` if its jobs could not be blocks."""
        name = type(provider).__name__
        if not isinstance(provider.launcher, SimpleLauncher):
            raise ConfigError(
                f"{name}: launcher={type(provider.launcher).__name__}: a block's script is run once, as it is; "
                "expected launcher=SimpleLauncher()"
            )
        if (refusal := self.refusal(provider)) is not None:
            raise ConfigError(f"{name}: {refusal}")
        self.provider = provider
        self._scripts = scripts
        self._layout = layout
        self._clock = clock
        self._limiter = PollLimiter(clock)
        self.reader = QueueReader(self._read, clock)
        self._reader_name = f"{id(self)}"
        self._ends: dict[str, JobStatus] = {}
        """How blocks ended, by name (an id may be another job's later): the scheduler forgets, and the first end
        counts."""
        self._absent_since: dict[str, float] = {}
        self._cancelled_at: dict[tuple[str, bool], float] = {}
        self._first_cancelled_at: dict[str, float] = {}
        provider.script_dir = str(scripts)  # an executor would set it
        provider.cmd_timeout = max(provider.cmd_timeout, COMMAND_TIMEOUT_S)
        runs = provider.execute_wait
        before = getattr(runs, "__self__", None)  # of an earlier scheduler of this provider
        self._runs: Callable[..., tuple[int, str, str]] = before._runs if isinstance(before, QueueScheduler) else runs
        provider.execute_wait = self._run_plain

    # What differs.

    @abstractmethod
    def refusal(self, provider: Any) -> str | None:
        """The settings of ``provider`` that a block's job cannot have, as ``FIELD: why``; ``None``: none. Adds required
        ones."""

    @abstractmethod
    def plain(self, command: str) -> str:
        """Parsl's command line, protected from the user's environment."""

    @abstractmethod
    def surely_refused(self, error: SubmitException) -> bool:
        """Whether a failed submit left no job."""

    @abstractmethod
    def job_ids(self, said: Iterable[str]) -> Sequence[str]:
        """The job ids among the lines of the submit command's output."""

    @abstractmethod
    def named(self, name: str) -> Sequence[Row]:
        """The jobs of block ``name``. Raises ``SchedulerSilent``."""

    @abstractmethod
    def status_of(self, row: Any) -> JobStatus | None:
        """The status that a row means; ``None``: a state of a later version. Raises ``SchedulerSilent``."""

    @abstractmethod
    def delete(self, block: Block, job: Job, forced: bool, cancelled_for_s: float) -> None:
        """End the job, unless its id belongs to another job by now. Raises ``SchedulerSilent``."""

    @abstractmethod
    def _read(self, numbers: frozenset[str]) -> Answer: ...

    def outlived(self, jobs: Mapping[str, Job]) -> Mapping[str, Any]:
        """The rows, by block name, of jobs that have left the queue, from longer-lived records."""
        return {}

    # What does not.

    def _run_plain(self, command: str, timeout: int | None = None) -> tuple[int, str, str]:
        """Run a command as Parsl does, with the settings of the site file only."""
        code, said, complained = self._runs(self.plain(command), timeout)
        return int(code), str(said), str(complained)

    def submit(self, name: str, script: str) -> Job:
        known = set(self.provider.resources)
        try:
            self.provider.submit(script, 1, name)
        except SubmitException as error:
            said = one_line(error.stderr or error.stdout or error.message)
            if self.surely_refused(error):
                raise ServiceError(f"block {name} was refused by {self.kind}: {said}") from None
            raise TimeoutError(f"block {name}: {self.kind} may or may not have its job: {said}") from None
        except (SchedulerMissingArgs, ScriptPathError) as error:
            raise ServiceError(f"block {name} could not be submitted: {error}") from None
        said_lines = {line: job for line, job in self.provider.resources.items() if line not in known}
        if not (ids := self.job_ids(said_lines)):
            said = one_line("\n".join(said_lines))
            raise TimeoutError(f"block {name}: {self.kind} may or may not have its job; it said {said!r}")
        output = str(said_lines[ids[0]]["job_stdout_path"])
        return Job(id=ids[0], script=output.removesuffix(".stdout"))

    def find(self, name: str) -> Job | None:
        found = self.named(name)
        if not found:
            return None
        row = max(found, key=lambda row: int(number_of(row.id)))
        return Job(id=row.id, script=str(self._scripts / row.name))

    def status(self, blocks: Sequence[Block]) -> Mapping[str, JobStatus]:
        """For each job: (1) the recorded end. (2) its row in the queue. (3) its row in longer-lived records. (4)
        unknown to all of them, repeatedly: gone, at the end of its walltime or before."""
        jobs = {block.name: block.job for block in blocks if block.job is not None}
        found = {name: self._ends[name] for name in jobs if name in self._ends}  # (1)
        asked = {name: job for name, job in jobs.items() if name not in found}
        self._forget_oldest()
        if not asked or not self._limiter.due(blocks, time.time()):
            return found
        try:
            answer = self.queue_answer(number_of(job.id) for job in asked.values())
            rows, asked = answer.rows, self._answered(asked, answer)
            here = {name: rows[number_of(job.id)] for name, job in asked.items() if _is_of(rows, job, name)}  # (2)
            here |= self.outlived({name: job for name, job in asked.items() if name not in here})  # (3)
            for name, row in here.items():
                self._absent_since.pop(name, None)
                if (status := self._judged(name, row)) is not None:
                    found[name] = status
            for block in blocks:
                if block.name in asked and block.name not in here and self._is_gone(block):  # (4)
                    found[block.name] = self._ends[block.name]
        except SchedulerSilent as silence:
            log.warning("scheduler silent kind=%s said=%s", self.kind, silence.message)
        return found

    def queue_answer(self, numbers: Iterable[str] = ()) -> Answer:
        """The cluster's queue. Raises ``SchedulerSilent``."""
        return self.reader.answer(self._reader_name, numbers)

    def _answered(self, asked: Mapping[str, Job], answer: Answer) -> dict[str, Job]:
        """The jobs of ``asked`` of which something was said; the others are as they were."""
        for name, job in asked.items():
            if number_of(job.id) in answer.unanswered:
                log.warning("scheduler silent about a job kind=%s block=%s job=%s", self.kind, name, job.id)
        return {name: job for name, job in asked.items() if number_of(job.id) not in answer.unanswered}

    def cancel(self, block: Block, forced: bool) -> None:
        """If the scheduler does not answer, the pool calls again at its next refresh."""
        job, now = block.job, self._clock()
        if job is None or block.name in self._ends or self.reader.away:
            return
        if now - self._cancelled_at.get((block.name, forced), float("-inf")) < TELL_AGAIN_S:
            return
        since = self._first_cancelled_at.setdefault(block.name, now)
        try:
            self.delete(block, job, forced, now - since)
        except SchedulerSilent as silence:
            log.warning("cancel failed kind=%s block=%s job=%s said=%s", self.kind, block.name, job.id, silence.message)
            return
        self._cancelled_at[block.name, forced] = now

    def _judged(self, name: str, row: Any) -> JobStatus | None:
        status = self.status_of(row)
        if status is None:
            log.warning("state unknown kind=%s block=%s job=%s state=%s", self.kind, name, row.id, row.state)
        elif status.phase.ended:
            if status.phase is BlockPhase.FAILED:
                outputs = (block_log(self._layout, name), self._scripts / f"{row.name}.stderr")
                status = replace(status, reason=f"{status.reason}{last_words(*outputs)}")
            self._ends[name] = status
        return status

    def _is_gone(self, block: Block) -> bool:
        now = self._clock()
        if now - self._absent_since.setdefault(block.name, now) < GONE_AFTER_S:
            return False
        if block.ends_at is not None and time.time() >= block.ends_at:
            end = JobStatus(BlockPhase.EXPIRED, f"its walltime ended; {self.kind} has no record of it")
        else:
            number = number_of(block.job.id) if block.job is not None else "?"
            end = JobStatus(BlockPhase.LOST, f"{self.kind} has no record of job {number} (any more)")
        self._ends[block.name] = end
        return True

    def _forget_oldest(self) -> None:
        known: tuple[dict[Any, Any], ...] = self._ends, self._absent_since, self._cancelled_at, self._first_cancelled_at
        for notes in known:
            while len(notes) > _KEPT:
                del notes[next(iter(notes))]

    def run(self, argv: Sequence[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run one of the scheduler's commands and accept any exit code. Raises ``SchedulerSilent``."""
        return run_command(argv, environ, self.provider.cmd_timeout)


def run_command(argv: Sequence[str], environ: Mapping[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a scheduler's command and accept any exit code.

    Raises:
        SchedulerSilent: there is no such command, it cannot be run, or it gave no answer within ``timeout_s``.
    """
    try:
        return subprocess.run(
            argv,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError:
        raise SchedulerSilent(f"{argv[0]}: no such command; is the scheduler's module loaded?") from None
    except OSError as error:  # no process or file descriptor left, or it may not be executed
        raise SchedulerSilent(f"{argv[0]} cannot be run: {error.strerror or error}") from None
    except subprocess.TimeoutExpired:
        raise SchedulerSilent(f"{argv[0]} gave no answer within {timeout_s:.0f} s") from None


def belongs_to(job_name: str, block: str) -> bool:
    """Whether a job belongs to ``block``: Parsl names it ``BLOCK.<seconds>.<fraction>``."""
    return job_name == block or job_name.startswith(f"{block}.")


def number_of(job_id: str) -> str:
    """``123`` of PBS's ``123.server.domain``: its commands disagree on how much of the server's name to include."""
    return job_id.partition(".")[0]


def one_line(text: str) -> str:
    """A command's output in one line."""
    return "; ".join(line.strip() for line in text.strip().splitlines())


def _is_of(rows: Rows, job: Job, block: str) -> bool:
    row = rows.get(number_of(job.id))
    return row is not None and belongs_to(row.name, block)
