"""Blocks in a PBS Pro (OpenPBS) queue, over Parsl's ``PBSProProvider``.

Parsl submits; everything else is asked of PBS here, because Parsl's answers cannot be built on: it takes absence, an
exiting and a failed job for completion, stumbles over JSON that PBS writes wrongly, knows only the jobs of its own
process, and gives no reasons. The job's name carries the block's, and is how it is found again.
"""

from __future__ import annotations

import logging
import os
import pwd
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parsl.launchers import SimpleLauncher
from parsl.providers import PBSProProvider
from parsl.providers.errors import SchedulerMissingArgs, ScriptPathError, SubmitException

from gateway_plugin.blocks.host import block_log
from gateway_plugin.blocks.ledger import Block, BlockPhase, Job
from gateway_plugin.errors import ConfigError, ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.schedulers import pbs_cli as words
from gateway_plugin.schedulers.base import Pace, Seen, forget_oldest, last_words
from gateway_plugin.schedulers.job_options import pbs_asked, pbs_refusal

log = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 30
GONE_AFTER_S = 30.0
"""How long PBS must keep saying that it does not know a job before the job counts as gone."""

TELL_AGAIN_S = 15.0
"""How often a job that does not end is told again."""

FORCE_AFTER_S = 60.0
"""How long a job was told to end before ``-W force``: with it PBS forgets the job, whatever still runs on its node."""

_SEARCHED = 200
"""The newest so many jobs of a user are searched for one by name: only a job submitted just now is ever looked for."""


class PbsSilent(ServiceError):
    """A command of PBS's gave no answer: the server is away, or busy for longer than we wait."""


class PbsJobs:
    """``Jobs`` of a ``PBSProProvider``. ``scripts``: a folder on the shared file system whose path needs no quoting."""

    in_doubt_s = 120.0
    """A ``qsub`` that was left behind goes on by itself."""

    def __init__(
        self, provider: PBSProProvider, scripts: Path, layout: Layout, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Make ``provider`` fit for blocks. Raises ``ConfigError`` for one whose jobs could not be what a block is."""
        if not isinstance(provider.launcher, SimpleLauncher):
            raise ConfigError(
                f"PBSProProvider: launcher={type(provider.launcher).__name__}: a block's script is run once, as it is; "
                "expected launcher=SimpleLauncher()"
            )
        if (refusal := pbs_refusal(provider)) is not None:
            raise ConfigError(f"PBSProProvider: scheduler_options: {refusal}")
        self._provider = provider
        self._scripts = scripts
        self._layout = layout
        self._clock = clock
        self._pace = Pace(clock)
        self._ends: dict[str, Seen] = {}
        """How blocks ended, by name (an id may be another job's one day): PBS forgets, and the first end stays."""
        self._absent_since: dict[str, float] = {}
        self._first_told_at: dict[str, float] = {}
        self._told_at: dict[str, float] = {}
        self._history = True
        """Until PBS says that it keeps none."""
        provider.script_dir = str(scripts)  # an executor would set it
        provider.cmd_timeout = max(provider.cmd_timeout, COMMAND_TIMEOUT_S)
        if pbs_asked(provider).value("r") is None:
            # PBS would start a block again, by itself, whose node failed: its name is a Ray node that is dead.
            provider.scheduler_options = f"{provider.scheduler_options}\n#PBS -r n".lstrip("\n")
        runs = provider.execute_wait
        before = getattr(runs, "__self__", None)
        self._runs: Callable[..., tuple[int, str, str]] = before._runs if isinstance(before, PbsJobs) else runs
        provider.execute_wait = self._run_unbent

    def _run_unbent(self, command: str, timeout: int | None = None) -> tuple[int, str, str]:
        """Parsl's way to run a command. Set by a user, the variable makes qsub pass over all directives of a script."""
        code, said, complained = self._runs(f"unset PBS_DPREFIX; {command}", timeout)
        return int(code), str(said), str(complained)

    def submit(self, name: str, script: str) -> Job:
        known = set(self._provider.resources)
        try:
            self._provider.submit(script, 1, name)
        except SubmitException as error:
            said = _one_line(error.stderr or error.stdout or error.message)
            if words.surely_refused(error.stderr or ""):
                raise ServiceError(f"block {name} was refused by PBS: {said}") from None
            raise TimeoutError(f"block {name}: PBS may or may not have its job: {said}") from None
        except (SchedulerMissingArgs, ScriptPathError) as error:
            raise ServiceError(f"block {name} could not be submitted: {error}") from None
        said_lines: dict[str, Any] = {
            line: job for line, job in self._provider.resources.items() if line not in known
        }  # Parsl takes every line that qsub said for the id of a job
        if not (ids := words.job_ids(said_lines)):
            said = _one_line("\n".join(said_lines))
            raise TimeoutError(f"block {name}: PBS may or may not have its job; qsub said {said!r}")
        output = str(said_lines[ids[0]]["job_stdout_path"])
        return Job(id=ids[0], script=output.removesuffix(".stdout"))

    def find(self, name: str) -> Job | None:
        """Raises ``PbsSilent`` when PBS cannot be asked: that is not the same as no job."""
        user = pwd.getpwuid(os.getuid()).pw_name
        said = self._ask(lambda history: words.own_jobs_argv(user, history))
        newest = sorted(words.job_ids(said.stdout.splitlines()), key=lambda job_id: int(words.number_of(job_id)))
        found = [row for row in self._rows(newest[-_SEARCHED:]) if words.belongs_to(row.name, name)]
        if not found:
            return None
        row = max(found, key=lambda row: int(words.number_of(row.id)))
        return Job(id=row.id, script=str(self._scripts / row.name))

    def look(self, blocks: Sequence[Block]) -> Mapping[str, Seen]:
        """For each job: (1) the end that was seen. (2) what PBS says. (3) unknown to it, again and again: gone, at the
        end of its walltime or before."""
        known = {block.name: block for block in blocks if block.job is not None}
        seen = {name: self._ends[name] for name in known if name in self._ends}  # (1)
        asked = {name: block for name, block in known.items() if name not in seen}
        forget_oldest(self._ends, self._absent_since, self._first_told_at, self._told_at)
        if not asked or not self._pace.due(blocks, time.time()):
            return seen
        try:
            ids = [block.job.id for block in asked.values() if block.job is not None]
            rows = {words.number_of(row.id): row for row in self._rows(ids)}
        except PbsSilent as silence:
            log.warning("pbs silent said=%s", silence.message)
            return seen
        for name, block in asked.items():
            row = rows.get(words.number_of(block.job.id)) if block.job is not None else None
            if row is not None and words.belongs_to(row.name, name):  # (2)
                self._absent_since.pop(name, None)
                if (found := self._meaning(name, row)) is not None:
                    seen[name] = found
            elif self._is_gone(block):  # (3)
                seen[name] = self._ends[name]
        return seen

    def cancel(self, block: Block, forced: bool) -> None:
        """A server that does not answer is told again on the next refresh."""
        job = block.job
        if job is None or block.name in self._ends:
            return
        now = self._clock()
        if now - self._told_at.get(block.name, float("-inf")) < TELL_AGAIN_S:
            return
        since = self._first_told_at.setdefault(block.name, now)
        try:
            rows = self._rows([job.id])  # ids begin again when a server loses its state, and qdel knows no names
            if any(words.belongs_to(row.name, block.name) for row in rows):
                self._delete(job.id, by_force=forced and now - since > FORCE_AFTER_S)
        except PbsSilent as silence:
            log.warning("pbs cancel failed block=%s job=%s said=%s", block.name, job.id, silence.message)
            return
        self._told_at[block.name] = now

    def _meaning(self, name: str, row: words.Row) -> Seen | None:
        seen = words.seen_in(row)
        if seen is None:
            log.warning("pbs state unknown block=%s job=%s state=%s", name, row.id, row.state)
        elif seen.phase.ended:
            if seen.phase is BlockPhase.FAILED:
                outputs = (block_log(self._layout, name), self._scripts / f"{row.name}.stderr")
                seen = Seen(seen.phase, f"{seen.reason}{last_words(*outputs)}", seen.node, seen.starts_at, seen.ends_at)
            self._ends[name] = seen
        return seen

    def _is_gone(self, block: Block) -> bool:
        now = self._clock()
        if now - self._absent_since.setdefault(block.name, now) < GONE_AFTER_S:
            return False
        if block.ends_at is not None and time.time() >= block.ends_at:
            self._ends[block.name] = Seen(BlockPhase.EXPIRED, "its walltime ended; PBS has no record of it")
        else:
            number = words.number_of(block.job.id) if block.job is not None else "?"
            self._ends[block.name] = Seen(BlockPhase.LOST, f"PBS has no record of job {number} (any more)")
        return True

    def _rows(self, job_ids: Iterable[str]) -> tuple[words.Row, ...]:
        """What PBS says of these jobs; none of those that it says it does not know. Raises ``PbsSilent``."""
        asked = [words.number_of(job_id) for job_id in job_ids]
        if not asked:
            return ()
        said = self._ask(lambda history: words.status_argv(asked, history))
        try:
            rows = words.parse_jobs(said.stdout)
        except (ValueError, TypeError, AttributeError) as error:
            raise PbsSilent(f"qstat: cannot be read: {error}") from None
        unanswered = {*asked} - words.unknown_jobs(said.stderr) - {words.number_of(row.id) for row in rows}
        if unanswered:
            raise PbsSilent(f"qstat said nothing of job {', '.join(sorted(unanswered))}: {_one_line(said.stderr)}")
        return rows

    def _delete(self, job_id: str, by_force: bool) -> None:
        said = self._run(words.cancel_argv(words.number_of(job_id), by_force))
        if said.returncode != 0 and not words.over_already(said.stderr):
            raise PbsSilent(f"qdel: {_one_line(said.stderr) or f'exit code {said.returncode}'}")

    def _ask(self, argv: Callable[[bool], Sequence[str]]) -> subprocess.CompletedProcess[str]:
        """Ask for jobs, those that are over too if this PBS remembers them. Raises ``PbsSilent``."""
        said = self._run(argv(self._history))
        if self._history and words.without_history(said.stderr):
            self._history = False
            log.warning("pbs keeps no history: how a job ended is known only while it is seen to end")
            said = self._run(argv(False))
        if said.returncode != 0 and not words.unknown_jobs(said.stderr):
            raise PbsSilent(f"{argv(True)[0]}: {_one_line(said.stderr) or f'exit code {said.returncode}'}")
        return said

    def _run(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        timeout_s = self._provider.cmd_timeout
        try:
            return subprocess.run(
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
            raise PbsSilent(f"{argv[0]}: no such command; is PBS's module loaded?") from None
        except subprocess.TimeoutExpired:
            raise PbsSilent(f"{argv[0]} gave no answer within {timeout_s} s") from None


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.strip().splitlines())
