"""Slurm's commands and parsers of their output. Pure: ``slurm.py`` runs the commands.

Queries are independent of the site's and the user's environment: every state, hidden partitions too, times in seconds
since the epoch, and without ``SQUEUE_STATES``, ``SACCT_FORMAT`` and similar variables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gateway_plugin.phases import BlockPhase
from gateway_plugin.schedulers.base import JobStatus
from gateway_plugin.schedulers.pending_reasons import never_clears

_QUEUE_FORMAT = "%A|%T|%r|%N|%S|%e|%j"
_ACCOUNTING_FORMAT = "JobIDRaw,State,Reason,NodeList,Start,End,ExitCode,JobName"
_NOTHING = frozenset({"", "None", "(null)", "N/A", "Unknown", "None assigned", "NONE"})
_UNKNOWN_JOB = re.compile(r"invalid job id|already completing or completed|unknown job", re.IGNORECASE)
_UNCERTAIN = re.compile(
    r"timed out|zero bytes|unexpected message|connection reset|transport endpoint"
    r"|\((send|receive|shutdown) failure\)",
    re.IGNORECASE,
)

_WHERE = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"})
"""Variables that select the Slurm cluster and the identity for it."""

_PENDING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD"})
_RUNNING = frozenset({"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"})
_ENDED = {
    "COMPLETED": BlockPhase.COMPLETED,
    "CANCELLED": BlockPhase.CANCELLED,
    "TIMEOUT": BlockPhase.EXPIRED,
    "DEADLINE": BlockPhase.EXPIRED,
    "FAILED": BlockPhase.FAILED,
    "BOOT_FAIL": BlockPhase.FAILED,
    "LAUNCH_FAILED": BlockPhase.FAILED,
    "RECONFIG_FAIL": BlockPhase.FAILED,
    "SPECIAL_EXIT": BlockPhase.FAILED,
    "OUT_OF_MEMORY": BlockPhase.FAILED,
    "NODE_FAIL": BlockPhase.LOST,
    "PREEMPTED": BlockPhase.LOST,
    "REVOKED": BlockPhase.LOST,
}
_END_WORDS = {
    "CANCELLED": "cancelled",
    "TIMEOUT": "its walltime ended",
    "DEADLINE": "its deadline came",
    "FAILED": "its job failed",
    "BOOT_FAIL": "its node did not boot",
    "LAUNCH_FAILED": "its job could not be launched",
    "OUT_OF_MEMORY": "it used more memory than its job may",
    "NODE_FAIL": "its node failed",
    "PREEMPTED": "preempted",
}


@dataclass(frozen=True)
class Row:
    """One job as Slurm reports it. Times are seconds since the epoch; for a pending job the queue's estimate."""

    id: str
    name: str
    state: str
    """The full name, without additions: ``CANCELLED``, not ``CA`` or ``CANCELLED by 0``."""
    reason: str | None = None
    node: str | None = None
    starts_at: float | None = None
    ends_at: float | None = None
    exit_code: str | None = None
    """``code:signal``; ``None`` where not requested."""

    @property
    def ended(self) -> bool:
        """Whether this state is final."""
        return self.state in _ENDED


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a query: that of the process, without variables that change the output."""
    bending = {*bends(environ), *(key for key in environ if key.startswith(("SQUEUE_", "SACCT_", "SCANCEL_")))}
    kept = {key: value for key, value in environ.items() if key not in bending}
    return {**kept, "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"}


def bends(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The variables of ``environ`` that would change a submit: for ``sbatch`` they take precedence over a script's
    lines.

    A shell's profile may set some (``SBATCH_ACCOUNT``), and a gateway that is started inside a job inherits that job's.
    """
    return tuple(sorted(key for key in environ if key.startswith(("SBATCH_", "SLURM_")) and key not in _WHERE))


def queue_argv(user: int, clusters: str | None = None) -> tuple[str, ...]:
    """All jobs of a user that ``slurmctld`` remembers, ended ones too (for ``MinJobAge``, 300 s by default)."""
    return ("squeue", *on_cluster(clusters), "--noheader", "--all", "-t", "all", "-u", str(user), "-o", _QUEUE_FORMAT)


def record_argv(job_id: str, clusters: str | None = None) -> tuple[str, ...]:
    """One job's record, with its exit code."""
    return ("scontrol", *on_cluster(clusters), "--all", "--oneliner", "show", "job", job_id)


def accounting_argv(job_ids: Iterable[str], clusters: str | None = None) -> tuple[str, ...]:
    """Accounting's record, where there is accounting, of jobs that ``slurmctld`` has forgotten."""
    jobs = ("-j", ",".join(job_ids))
    return ("sacct", *on_cluster(clusters), "-X", "--noheader", "--parsable2", *jobs, "-o", _ACCOUNTING_FORMAT)


def cancel_argv(job_id: str, job_name: str | None, forced: bool, clusters: str | None = None) -> tuple[str, ...]:
    """End a job: SIGTERM to its batch shell, SIGKILL to all of it after the site's ``KillWait``.

    ``forced``: to its steps too; Slurm sends SIGTERM and waits ``KillWait`` in any case, independent of the signal
    given.

    With ``job_name`` only if the job still has this name: ids start again when a controller loses its state.
    """
    name = () if job_name is None else (f"--name={job_name}",)
    return ("scancel", *on_cluster(clusters), *name, *(("--signal=KILL", "--full") if forced else ()), job_id)


def on_cluster(clusters: str | None) -> tuple[str, ...]:
    """The option that names the cluster, for every command."""
    return () if clusters is None else (f"--clusters={clusters}",)


def parse_queue(text: str) -> tuple[Row, ...]:
    """The rows in the output of ``queue_argv``; other lines (``CLUSTER: x``) are skipped."""
    rows = []
    for line in text.splitlines():
        fields = line.strip().split("|", 6)
        if len(fields) == 7 and fields[0].isdigit():
            job_id, state, reason, node, starts, ends, name = fields
            rows.append(Row(job_id, name, state, _said(reason), _said(node), _time(starts), _time(ends)))
    return tuple(rows)


def parse_record(text: str) -> Row | None:
    """The row in the output of ``record_argv``; ``None`` if it has none."""
    found = dict(re.findall(r"(?:^|\s)([A-Za-z][\w:/]*)=(\S*)", text))
    if not {"JobId", "JobName", "JobState"} <= found.keys():
        return None
    return Row(
        id=found["JobId"],
        name=found["JobName"],
        state=found["JobState"],
        reason=_said(found.get("Reason", "")),
        node=_said(found.get("NodeList", "")),
        starts_at=_time(found.get("StartTime", "")),
        ends_at=_time(found.get("EndTime", "")),
        exit_code=found.get("ExitCode"),
    )


def parse_accounting(text: str) -> tuple[Row, ...]:
    """The rows in the output of ``accounting_argv``."""
    rows = []
    for line in text.splitlines():
        fields = line.strip().split("|", 7)
        if len(fields) == 8 and fields[1]:
            job_id, state, reason, node, starts, ends, code, name = fields
            state, _, by = state.partition(" ")  # "CANCELLED by 1000"
            said = by.replace("by ", "by user ") if by else _said(reason)
            rows.append(Row(job_id, name, state, said, _said(node), _time(starts), _time(ends), code))
    return tuple(rows)


def _said(text: str) -> str | None:
    return None if text in _NOTHING else text


def _time(text: str) -> float | None:
    return float(text) if text.isdigit() else None


def status_in(row: Row) -> JobStatus | None:
    """The block status that a row means; ``None``: an unknown state of a later Slurm.

    (1) pending, with Slurm's reason and its estimate. (2) running; a job that completes still holds its node. (3)
    ended.
    """
    if row.state in _PENDING:  # (1)
        held = row.state.endswith("_HOLD")  # the reason says why; there may be none
        reason = row.reason if row.state == "PENDING" or (held and row.reason) else row.state.lower()
        return JobStatus(BlockPhase.PENDING, reason, starts_at=row.starts_at, never_clears=never_clears(reason))
    if row.state in _RUNNING:  # (2)
        reason = None if row.state == "RUNNING" else row.state.lower()
        return JobStatus(BlockPhase.RUNNING, reason, row.node, row.starts_at, row.ends_at)
    if row.state in _ENDED:  # (3)
        return JobStatus(_ENDED[row.state], _why_ended(row), row.node, row.starts_at, row.ends_at)
    return None


def _why_ended(row: Row) -> str | None:
    if row.state == "COMPLETED":
        return None
    words = _END_WORDS.get(row.state, f"Slurm calls it {row.state}")
    code, _, signal = (row.exit_code or "").partition(":")
    if row.state == "FAILED" and signal not in ("", "0"):
        words = f"its script was ended by signal {signal}"
    elif row.state == "FAILED" and code not in ("", "0"):
        words = f"its script left with exit code {code}"
    elif row.reason is not None and (row.state != "CANCELLED" or row.reason.startswith("by ")):
        # The queue keeps the pending reason of a cancelled job.
        words = f"{words} ({row.reason})"
    return f"{words} on {row.node}" if row.node is not None else words


def nameless(row: Row) -> bool:
    """Whether accounting lost the job's name, which happens if a short job's end is recorded before its start."""
    return row.name in ("allocation", "")


def unknown_job(stderr: str) -> bool:
    """Whether a command failed because Slurm does not have the job (any more): a definite answer, unlike other
    failures."""
    return _UNKNOWN_JOB.search(stderr) is not None


def no_verdict(exit_code: int, stderr: str) -> bool:
    """Whether ``sbatch --test-only`` failed without a word of the controller's on the job."""
    return exit_code != 0 and (not surely_refused(exit_code, stderr) or "contact slurm controller" in stderr.lower())


def surely_refused(exit_code: int | None, stderr: str) -> bool:
    """Whether a failed ``sbatch`` left no job. If its output was lost, or could not be parsed, it may have left one."""
    return exit_code not in (None, 0) and _UNCERTAIN.search(stderr) is None
