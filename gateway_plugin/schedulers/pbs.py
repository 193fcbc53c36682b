"""Blocks in a PBS Pro (OpenPBS) queue, over Parsl's ``PBSProProvider``: ``pbs_cli.py`` parses PBS's output.

In addition to the limits listed in ``queue.py``, Parsl fails on the invalid JSON that PBS writes.
"""

from __future__ import annotations

import logging
import os
import pwd
import subprocess
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from parsl.providers.errors import SubmitException

from gateway_plugin.blocks.ledger import Block, Job
from gateway_plugin.schedulers import pbs_cli as cli
from gateway_plugin.schedulers.base import JobStatus, SchedulerSilent
from gateway_plugin.schedulers.job_options import pbs_asked, pbs_refusal
from gateway_plugin.schedulers.queue import QueueScheduler, belongs_to, number_of, one_line
from gateway_plugin.schedulers.queue_reader import Answer

log = logging.getLogger(__name__)

FORCE_AFTER_S = 60.0
"""Delay until ``qdel`` becomes ``-W force``, after which PBS forgets the job even if its processes still run."""

_SEARCHED = 200
"""A search by name reads this many of the user's newest jobs: only a job submitted just now is ever searched for."""


class PbsScheduler(QueueScheduler):
    """``Scheduler`` of a ``PBSProProvider``."""

    kind = "PBS"
    _history = True
    """Whether to ask for ended jobs, until PBS reports that it keeps no history."""

    def refusal(self, provider: Any) -> str | None:
        if (wrong := pbs_refusal(provider)) is not None:
            return f"scheduler_options: {wrong}"
        if pbs_asked(provider).value("r") is None:
            # PBS would requeue a block after a node failure, under the name of a Ray node that is dead.
            provider.scheduler_options = f"{provider.scheduler_options}\n#PBS -r n".lstrip("\n")
        return None

    def plain(self, command: str) -> str:
        """If a user sets this variable, qsub ignores all directives of a script."""
        return f"unset PBS_DPREFIX; {command}"

    def surely_refused(self, error: SubmitException) -> bool:
        return cli.surely_refused(error.stderr or "")

    def job_ids(self, said: Iterable[str]) -> Sequence[str]:
        return cli.job_ids(said)  # Parsl takes every line of qsub's output for a job id

    def named(self, name: str) -> Sequence[cli.Row]:
        user = pwd.getpwuid(os.getuid()).pw_name
        said = self._ask(lambda history: cli.own_jobs_argv(user, history))
        newest = sorted((number_of(job_id) for job_id in cli.job_ids(said.stdout.splitlines())), key=int)
        answer = self._read(frozenset(newest[-_SEARCHED:]))
        found = [row for row in answer.rows.values() if belongs_to(row.name, name)]
        if answer.unanswered and not found:  # it may be one of these
            raise SchedulerSilent(f"qstat said nothing of job {', '.join(sorted(answer.unanswered))}")
        return found

    def _read(self, numbers: frozenset[str]) -> Answer:
        """These jobs, without those that PBS says it does not know. An answer that fails for one serves the others."""
        if not numbers:
            return Answer({})
        said = self._with_history(lambda history: cli.status_argv(sorted(numbers), history))
        try:
            rows = {number_of(row.id): row for row in cli.parse_jobs(said.stdout)}
        except ValueError as error:
            self._demand_success(said)
            raise SchedulerSilent(f"qstat: cannot be read: {error}") from None
        if not rows:
            self._demand_success(said)
        return Answer(rows, numbers - cli.unknown_jobs(said.stderr) - rows.keys())

    def status_of(self, row: cli.Row) -> JobStatus | None:
        return cli.status_in(row)

    def delete(self, block: Block, job: Job, forced: bool, cancelled_for_s: float) -> None:
        number = number_of(job.id)
        answer = self._read(frozenset({number}))
        if answer.unanswered:
            raise SchedulerSilent(f"qstat said nothing of job {number}")
        row = answer.rows.get(number)
        if row is None or not belongs_to(row.name, block.name):
            return  # ids start again when a server loses its state, and qdel cannot check names
        said = self._run(cli.cancel_argv(number, by_force=forced and cancelled_for_s > FORCE_AFTER_S))
        if said.returncode != 0 and not cli.over_already(said.stderr):
            raise SchedulerSilent(f"qdel: {one_line(said.stderr) or f'exit code {said.returncode}'}")

    def _ask(self, argv: Callable[[bool], Sequence[str]]) -> subprocess.CompletedProcess[str]:
        """Ask for jobs, ended ones too if this PBS remembers them. Raises ``SchedulerSilent``, also on failure."""
        said = self._with_history(argv)
        self._demand_success(said)
        return said

    def _with_history(self, argv: Callable[[bool], Sequence[str]]) -> subprocess.CompletedProcess[str]:
        said = self._run(argv(self._history))
        if self._history and cli.without_history(said.stderr):
            self._history = False
            log.warning("pbs keeps no history: how a job ended is known only while it is seen to end")
            said = self._run(argv(False))
        return said

    def _demand_success(self, said: subprocess.CompletedProcess[str]) -> None:
        if said.returncode != 0 and not cli.unknown_jobs(said.stderr):
            raise SchedulerSilent(f"{said.args[0]}: {one_line(said.stderr) or f'exit code {said.returncode}'}")

    def _run(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return self.run(argv, cli.environment(os.environ))
