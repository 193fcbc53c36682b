"""Blocks in a Slurm queue, over Parsl's ``SlurmProvider``.

Parsl submits; everything else is asked of Slurm here, because Parsl's answers cannot be built on (each has a test in
``tests/slurm/test_parsl_traps.py``): it takes absence for completion, forgets a job's end on the next poll, knows only
the jobs of its own process, and gives no reasons. The job's name carries the block's, and is how it is found again.
"""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider
from parsl.providers.errors import SchedulerMissingArgs, ScriptPathError, SubmitException

from gateway_plugin.blocks.host import block_log
from gateway_plugin.blocks.ledger import Block, BlockPhase, Job
from gateway_plugin.errors import ConfigError, ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.schedulers import slurm_cli as words
from gateway_plugin.schedulers.base import Pace, Seen, forget_oldest, last_words, walltime_s
from gateway_plugin.schedulers.job_options import slurm_refusal

log = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 30
"""A busy controller needs more than Parsl's 10 s; one that is away is given up after 9 to 18 s by the commands."""

GONE_AFTER_S = 30.0
"""How long Slurm must keep saying that it does not know a job before the job counts as gone."""

TELL_AGAIN_S = 15.0
"""How often a job that does not end is told again."""

_NO_REQUEUE = "#SBATCH --no-requeue\n"


class SlurmSilent(ServiceError):
    """A command of Slurm's gave no answer: the controller is away, or busy for longer than we wait."""


class SlurmJobs:
    """``Jobs`` of a ``SlurmProvider``. ``scripts``: a folder on the shared file system whose path needs no quoting."""

    in_doubt_s = 120.0
    """An ``sbatch`` that was left behind goes on by itself, for the site's ``MessageTimeout`` (10 s to 100 s)."""

    def __init__(
        self, provider: SlurmProvider, scripts: Path, layout: Layout, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Make ``provider`` fit for blocks. Raises ``ConfigError`` for one whose jobs could not be what a block is."""
        if not isinstance(provider.launcher, SimpleLauncher):
            raise ConfigError(
                f"SlurmProvider: launcher={type(provider.launcher).__name__}: a block's script is run once, as it is; "
                "expected launcher=SimpleLauncher()"
            )
        if (refusal := slurm_refusal(provider)) is not None:
            raise ConfigError(f"SlurmProvider: scheduler_options: {refusal}")
        if walltime_s(provider) == 0:
            raise ConfigError(
                f"SlurmProvider: walltime={provider.walltime!r}: Parsl counts minutes, and to Slurm none are no limit; "
                "expected a minute or more: '00:01:00'"
            )
        self._provider = provider
        self._scripts = scripts
        self._layout = layout
        self._clock = clock
        self._pace = Pace(clock)
        self._ends: dict[str, Seen] = {}
        """How blocks ended, by name (an id may be another job's one day): Slurm forgets, and the first end stays."""
        self._absent_since: dict[str, float] = {}
        self._told_at: dict[tuple[str, bool], float] = {}
        provider.script_dir = str(scripts)  # an executor would set it
        provider.cmd_timeout = max(provider.cmd_timeout, COMMAND_TIMEOUT_S)
        runs = provider.execute_wait
        before = getattr(runs, "__self__", None)
        self._runs: Callable[..., tuple[int, str, str]] = before._runs if isinstance(before, SlurmJobs) else runs
        provider.execute_wait = self._run_unbent
        if _NO_REQUEUE not in provider.scheduler_options:
            # Slurm would start a block again, by itself, whose node failed: its name is a Ray node that is dead.
            provider.scheduler_options += _NO_REQUEUE

    def _run_unbent(self, command: str, timeout: int | None = None) -> tuple[int, str, str]:
        """Parsl's way to run a command, with what the site file says and nothing else: no ``SBATCH_PARTITION``."""
        if bent := words.bends(os.environ):
            log.warning("slurm variables ignored (a site file says what a job asks for): %s", " ".join(bent))
            command = f"env {' '.join(f'-u {shlex.quote(name)}' for name in bent)} {command}"
        code, said, complained = self._runs(command, timeout)
        return int(code), str(said), str(complained)

    def submit(self, name: str, script: str) -> Job:
        try:
            job_id = self._provider.submit(script, 1, name)
        except SubmitException as error:
            said = _one_line(error.stderr or error.stdout or error.message)
            if words.surely_refused(error.retcode, error.stderr or ""):
                raise ServiceError(f"block {name} was refused by Slurm: {said}") from None
            raise TimeoutError(f"block {name}: Slurm may or may not have its job: {said}") from None
        except (SchedulerMissingArgs, ScriptPathError) as error:
            raise ServiceError(f"block {name} could not be submitted: {error}") from None
        output = str(self._provider.resources[job_id]["job_stdout_path"])
        return Job(id=job_id, script=output.removesuffix(".stdout"))

    def find(self, name: str) -> Job | None:
        """Raises ``SlurmSilent`` when Slurm cannot be asked: that is not the same as no job."""
        found = [row for row in self._queue() if words.belongs_to(row.name, name)]
        if not found:
            return None
        row = max(found, key=lambda row: int(row.id))
        return Job(id=row.id, script=str(self._scripts / row.name))

    def look(self, blocks: Sequence[Block]) -> Mapping[str, Seen]:
        """For each job: (1) the end that was seen. (2) what the queue says. (3) what the records say that outlive it.
        (4) unknown to all of them, again and again: lost."""
        jobs = {block.name: block.job for block in blocks if block.job is not None}
        seen = {name: self._ends[name] for name in jobs if name in self._ends}  # (1)
        asked = {name: job for name, job in jobs.items() if name not in seen}
        forget_oldest(self._ends, self._absent_since, self._told_at)
        if not asked or not self._pace.due(blocks, time.time()):
            return seen
        try:
            rows = {row.id: row for row in self._queue()}
            here = {name: rows[job.id] for name, job in asked.items() if _same(rows.get(job.id), name)}  # (2)
            gone = {name: job for name, job in asked.items() if name not in here}
            here |= self._records(gone)  # (3)
            for name, row in here.items():
                self._absent_since.pop(name, None)
                if (found := self._meaning(name, row)) is not None:
                    seen[name] = found
            for name, job in gone.items():
                if name not in here and self._is_lost(name, job):  # (4)
                    seen[name] = self._ends[name]
        except SlurmSilent as silence:
            log.warning("slurm silent said=%s", silence.message)
        return seen

    def cancel(self, block: Block, forced: bool) -> None:
        """A controller that does not answer is told again on the next refresh."""
        job = block.job
        if job is None or block.name in self._ends:
            return
        now = self._clock()
        if now - self._told_at.get((block.name, forced), float("-inf")) < TELL_AGAIN_S:
            return
        job_name = Path(job.script).name if job.script is not None else None
        try:
            self._ask(words.cancel_argv(job.id, job_name, forced, self._provider.clusters))
        except SlurmSilent as silence:
            log.warning("slurm cancel failed block=%s job=%s said=%s", block.name, job.id, silence.message)
            return
        self._told_at[block.name, forced] = now

    def _queue(self) -> tuple[words.Row, ...]:
        return words.parse_queue(self._ask(words.queue_argv(os.getuid(), self._provider.clusters)))

    def _records(self, jobs: Mapping[str, Job]) -> dict[str, words.Row]:
        """The rows of jobs that are not in the queue: the controller's own record first, then accounting."""
        clusters = self._provider.clusters
        found = {}
        for name, job in jobs.items():
            row = words.parse_record(self._ask(words.record_argv(job.id, clusters)))
            if row is not None and _same(row, name):
                found[name] = row
        left = {job.id: name for name, job in jobs.items() if name not in found}
        if left:
            try:
                rows = words.parse_accounting(self._ask(words.accounting_argv(left, clusters)))
            except SlurmSilent:
                rows = ()  # a site without accounting, or its database is away
            # Accounting is told late: a job that runs there and not in the queue is no job that runs.
            ended = [row for row in rows if row.ended and row.id in left]
            found |= {left[row.id]: row for row in ended if _same(row, left[row.id]) or words.nameless(row)}
        return found

    def _meaning(self, name: str, row: words.Row) -> Seen | None:
        if row.state == "FAILED" and row.exit_code is None:
            with_code = words.parse_record(self._ask(words.record_argv(row.id, self._provider.clusters)))
            row = row if with_code is None else replace(row, exit_code=with_code.exit_code)
        seen = words.seen_in(row)
        if seen is None:
            log.warning("slurm state unknown block=%s job=%s state=%s", name, row.id, row.state)
        elif seen.phase.ended:
            if seen.phase is BlockPhase.FAILED:
                outputs = (block_log(self._layout, name), self._scripts / f"{row.name}.stderr")
                seen = replace(seen, reason=f"{seen.reason}{last_words(*outputs)}")
            self._ends[name] = seen
        return seen

    def _is_lost(self, name: str, job: Job) -> bool:
        now = self._clock()
        if now - self._absent_since.setdefault(name, now) < GONE_AFTER_S:
            return False
        self._ends[name] = Seen(BlockPhase.LOST, f"Slurm has no record of job {job.id} (any more)")
        return True

    def _ask(self, argv: Sequence[str]) -> str:
        """What a command answered; empty if Slurm does not know the job. Raises ``SlurmSilent``."""
        timeout_s = self._provider.cmd_timeout
        try:
            done = subprocess.run(
                argv,
                env=words.environment(os.environ),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except FileNotFoundError:
            raise SlurmSilent(f"{argv[0]}: no such command; is Slurm's module loaded?") from None
        except subprocess.TimeoutExpired:
            raise SlurmSilent(f"{argv[0]} gave no answer within {timeout_s} s") from None
        if done.returncode == 0 or words.unknown_job(done.stderr):
            return done.stdout
        raise SlurmSilent(f"{argv[0]}: {_one_line(done.stderr) or f'exit code {done.returncode}'}")


def _same(row: words.Row | None, block: str) -> bool:
    return row is not None and words.belongs_to(row.name, block)


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.strip().splitlines())
