"""Blocks in a Slurm queue, over Parsl's ``SlurmProvider``: runs its commands; ``slurm_cli.py`` parses the output."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from parsl.providers.errors import SubmitException

from gateway_plugin.blocks.ledger import Block, Job
from gateway_plugin.schedulers import slurm_cli as cli
from gateway_plugin.schedulers.base import JobStatus, SchedulerSilent, walltime_s
from gateway_plugin.schedulers.job_options import slurm_refusal
from gateway_plugin.schedulers.queue import QueueScheduler, belongs_to, one_line
from gateway_plugin.schedulers.queue_reader import Answer

log = logging.getLogger(__name__)

_NO_REQUEUE = "#SBATCH --no-requeue\n"


class SlurmScheduler(QueueScheduler):
    """``Scheduler`` of a ``SlurmProvider``."""

    kind = "Slurm"

    def refusal(self, provider: Any) -> str | None:
        if (wrong := slurm_refusal(provider)) is not None:
            return f"scheduler_options: {wrong}"
        if walltime_s(provider) == 0:
            return (
                f"walltime={provider.walltime!r}: Parsl counts minutes, and to Slurm none are no limit; "
                "expected a minute or more: '00:01:00'"
            )
        if _NO_REQUEUE not in provider.scheduler_options:
            # Slurm would requeue a block after a node failure, under the name of a Ray node that is dead.
            provider.scheduler_options += _NO_REQUEUE
        return None

    def plain(self, command: str) -> str:
        """For ``sbatch``, variables like ``SBATCH_PARTITION`` take precedence over the script's lines."""
        bent = cli.bends(os.environ)
        if not bent:
            return command
        log.warning("slurm variables ignored (a site file says what a job asks for): %s", " ".join(bent))
        return f"env {' '.join(f'-u {shlex.quote(name)}' for name in bent)} {command}"

    def surely_refused(self, error: SubmitException) -> bool:
        return cli.surely_refused(error.retcode, error.stderr or "")

    def job_ids(self, said: Iterable[str]) -> Sequence[str]:
        return tuple(said)  # Parsl parsed the number from sbatch's output

    def named(self, name: str) -> Sequence[cli.Row]:
        return [row for row in self.queue_answer().rows.values() if belongs_to(row.name, name)]

    def _read(self, numbers: frozenset[str]) -> Answer:
        """All jobs of this user that ``slurmctld`` remembers, independent of ``numbers``."""
        said = self._ask(cli.queue_argv(os.getuid(), self.provider.clusters))
        return Answer({row.id: row for row in cli.parse_queue(said)})

    def outlived(self, jobs: Mapping[str, Job]) -> Mapping[str, cli.Row]:
        """The controller's own record first, then accounting."""
        clusters = self.provider.clusters
        found = {}
        for name, job in jobs.items():
            row = cli.parse_record(self._ask(cli.record_argv(job.id, clusters)))
            if row is not None and belongs_to(row.name, name):
                found[name] = row
        left = {job.id: name for name, job in jobs.items() if name not in found}
        if left:
            try:
                rows = cli.parse_accounting(self._ask(cli.accounting_argv(left, clusters)))
            except SchedulerSilent:
                rows = ()  # a site without accounting, or its database is down
            # Accounting lags: a job that is running there but not in the queue does not run.
            ended = [row for row in rows if row.ended and row.id in left]
            found |= {left[row.id]: row for row in ended if belongs_to(row.name, left[row.id]) or cli.nameless(row)}
        return found

    def status_of(self, row: cli.Row) -> JobStatus | None:
        if row.state == "FAILED" and row.exit_code is None:  # squeue does not report it
            with_code = cli.parse_record(self._ask(cli.record_argv(row.id, self.provider.clusters)))
            row = row if with_code is None else replace(row, exit_code=with_code.exit_code)
        return cli.status_in(row)

    def delete(self, block: Block, job: Job, forced: bool, cancelled_for_s: float) -> None:
        job_name = Path(job.script).name if job.script is not None else None
        self._ask(cli.cancel_argv(job.id, job_name, forced, self.provider.clusters))

    def _ask(self, argv: Sequence[str]) -> str:
        """A command's output; empty if Slurm does not have the job. Raises ``SchedulerSilent``."""
        done = self.run(argv, cli.environment(os.environ))
        if done.returncode == 0 or cli.unknown_job(done.stderr):
            return done.stdout
        raise SchedulerSilent(f"{argv[0]}: {one_line(done.stderr) or f'exit code {done.returncode}'}")
