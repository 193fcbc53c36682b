"""PBS Pro's commands and parsers of their output. Pure: ``pbs.py`` runs the commands.

``qstat -F json`` reports every field, with two defects: times in ``ctime`` format in the caller's time zone (so the
query sets UTC), and invalid JSON where a job's environment has backslashes or leading zeros (openpbs issues 2541 and
1255). The environment is not needed, so it is removed before parsing.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from gateway_plugin.phases import BlockPhase
from gateway_plugin.schedulers.base import JobStatus
from gateway_plugin.schedulers.pending_reasons import never_clears

_PENDING = {"Q": None, "H": "held", "W": "waiting for its time", "T": "moving between servers"}
_RUNNING = {"R": None, "E": "exiting", "S": "suspended", "U": "suspended", "B": None}
_ENDED = frozenset({"F", "X"})

_DELETED = 91
"""The substate of a finished job that was deleted, before or while it ran."""

_LIMITS = {-24: "cores", -25: "cores", -26: "memory", -27: "memory", -28: "processor time"}
_OUT_OF_TIME = -29
_BY_SIGNAL = 256

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_CTIME = re.compile(r"[A-Z][a-z]{2} ([A-Z][a-z]{2}) +(\d+) (\d+):(\d+):(\d+) (\d{4})")
_ENVIRONMENT = re.compile(r'"Variable_List"\s*:\s*\{.*?\n\s*\}', re.DOTALL)
_JOB_ID = re.compile(r"\d+(\.[\w.-]+)?")
_JOB = re.compile(r'^\s*"(\d+(?:\.[\w.-]+)?)"\s*:\s*\{', re.MULTILINE)
_UNKNOWN_JOB = re.compile(r"Unknown Job Id(?: Error)?\s+(\d+)", re.IGNORECASE)
_OVER = re.compile(
    r"unknown job id|job has finished|request invalid for (state|finished)|history job|invalid state", re.IGNORECASE
)
_UNCERTAIN = re.compile(
    r"end of file|premature|communication|protocol|timed? ?out|connection reset|broken pipe", re.IGNORECASE
)


@dataclass(frozen=True)
class Row:
    """One job as PBS reports it. Times are seconds since the epoch; for a pending job ``starts_at`` is an estimate."""

    id: str
    name: str
    state: str
    """One letter."""
    comment: str | None = None
    node: str | None = None
    starts_at: float | None = None
    ends_at: float | None = None
    exit_status: int | None = None
    """The script's exit code; above 256 a signal, below 0 one of PBS's own reasons."""
    deleted: bool = False
    walltime_used_up: bool = False


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a query: that of the process, with times in UTC."""
    return {**environ, "TZ": "UTC0", "LC_ALL": "C"}


def status_argv(job_ids: Iterable[str], history: bool = True) -> tuple[str, ...]:
    """The command that shows these jobs, with ``history`` ended ones too."""
    return ("qstat", *(("-x",) if history else ()), "-f", "-F", "json", *job_ids)


def own_jobs_argv(user: str, history: bool = True) -> tuple[str, ...]:
    """The command that lists the ids of a user's jobs."""
    return ("qselect", *(("-x",) if history else ()), "-u", user)


def cancel_argv(job_id: str, by_force: bool) -> tuple[str, ...]:
    """End a job: SIGTERM to all of it, SIGKILL after the site's ``kill_delay`` (10 s by default). ``by_force``: also if
    its node cannot be reached; PBS then forgets processes that may still run there."""
    return ("qdel", *(("-W", "force") if by_force else ()), job_id)


def job_ids(lines: Iterable[str]) -> tuple[str, ...]:
    """The job ids in these lines: sites let ``qsub`` print other text, too."""
    return tuple(line.strip() for line in lines if _JOB_ID.fullmatch(line.strip()))


def parse_jobs(text: str) -> tuple[Row, ...]:
    """The rows of ``status_argv``'s answer, without jobs that cannot be read. Raises ``ValueError`` if nothing can."""
    plain = _ENVIRONMENT.sub('"Variable_List":{}', text)
    try:
        document = json.loads(plain, strict=False)
    except ValueError:
        if not (document := {"Jobs": _readable_jobs(plain)})["Jobs"]:
            raise
    jobs = document.get("Jobs", {}) if isinstance(document, dict) else None
    if not isinstance(jobs, dict):
        raise ValueError("expected an object")
    rows = []
    for job_id, job in jobs.items():
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            rows.append(_row(job_id, job))
    return tuple(rows)


def _readable_jobs(text: str) -> dict[str, Any]:
    """The jobs of an answer that is no JSON as a whole, each read by itself."""
    decoder, found = json.JSONDecoder(strict=False), {}
    for start in _JOB.finditer(text):
        with contextlib.suppress(ValueError):
            found[start[1]] = decoder.raw_decode(text, start.end() - 1)[0]
    return found


def _row(job_id: str, job: Mapping[str, Any]) -> Row:
    starts_at = _time(job.get("stime"))
    asked_s = duration_s(job.get("Resource_List", {}).get("walltime"))
    used_s = duration_s(job.get("resources_used", {}).get("walltime"))
    state = str(job.get("job_state", ""))
    over = state in _ENDED
    lived_s = used_s if over else asked_s
    ends_at = None if starts_at is None or lived_s is None else starts_at + lived_s
    status = job.get("Exit_status")
    comment = str(job.get("comment", "")).strip()
    return Row(
        id=job_id,
        name=str(job.get("Job_Name", "")),
        state=state,
        comment=comment or None,
        node=_node(str(job.get("exec_host", ""))),
        starts_at=starts_at if starts_at is not None else _time(job.get("estimated", {}).get("start_time")),
        ends_at=_time(job.get("obittime")) or ends_at if over else ends_at,
        exit_status=None if status is None else int(status),
        deleted=str(job.get("substate")) == str(_DELETED) or comment.endswith("terminated"),
        walltime_used_up=used_s is not None and asked_s is not None and used_s >= asked_s,
    )


def duration_s(text: object) -> float | None:
    """``HH:MM:SS`` or seconds, in seconds; ``None`` if it is neither."""
    parts = str(text).split(":")
    if not 1 <= len(parts) <= 3 or not all(part.isdigit() for part in parts):
        return None
    seconds = 0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return float(seconds)


def _time(value: object) -> float | None:
    """Seconds since the epoch, from a number or from a ``ctime`` text in UTC."""
    text = str(value)
    if text.isdigit():
        return float(text) or None
    found = _CTIME.fullmatch(text)
    if found is None or found[1] not in _MONTHS:
        return None
    day, hour, minute, second, year = (int(part) for part in found.groups()[1:])
    return datetime(year, _MONTHS.index(found[1]) + 1, day, hour, minute, second, tzinfo=UTC).timestamp()


def _node(exec_host: str) -> str | None:
    """``x3001`` of ``x3001/0*64+x3002/0*64``: a block has one node."""
    return exec_host.partition("+")[0].partition("/")[0] or None


def status_in(row: Row) -> JobStatus | None:
    """The block status that a row means; ``None``: an unknown state.

    (1) pending, with PBS's comment and its estimate. (2) running; a job that exits still holds its node. (3) ended:
    (3a) at its walltime. (3b) with exit code 0, cancelled or not. (3c) deleted. (3d) any other way.
    """
    if row.state in _PENDING:  # (1)
        reason = row.comment or _PENDING[row.state]
        return JobStatus(BlockPhase.PENDING, reason, starts_at=row.starts_at, never_clears=never_clears(reason))
    if row.state in _RUNNING:  # (2)
        return JobStatus(BlockPhase.RUNNING, _RUNNING[row.state], row.node, row.starts_at, row.ends_at)
    if row.state not in _ENDED:
        return None
    phase, why = _end(row)  # (3)
    on_node = f"{why} on {row.node}" if why is not None and row.node is not None else why
    return JobStatus(phase, on_node, row.node, row.starts_at, row.ends_at)


def _end(row: Row) -> tuple[BlockPhase, str | None]:
    status = row.exit_status
    if status == _OUT_OF_TIME or (row.walltime_used_up and status != 0):  # (3a) older versions report SIGTERM only
        return BlockPhase.EXPIRED, "its walltime ended"
    if status == 0:  # (3b)
        return BlockPhase.COMPLETED, None
    if row.deleted:  # (3c)
        return BlockPhase.CANCELLED, "deleted"
    if status is None:  # (3d)
        return BlockPhase.FAILED, f"its job never ran ({row.comment})" if row.comment else "its job never ran"
    if status in _LIMITS:
        return BlockPhase.FAILED, f"it used more {_LIMITS[status]} than its job may"
    if status < 0:
        return BlockPhase.FAILED, f"PBS could not run its job (Exit_status {status}; {row.comment or 'no comment'})"
    if status > _BY_SIGNAL:
        return BlockPhase.FAILED, f"its script was ended by signal {status - _BY_SIGNAL}"
    return BlockPhase.FAILED, f"its script left with exit code {status}"


def unknown_jobs(stderr: str) -> frozenset[str]:
    """The numbers of the jobs that ``qstat`` reports as unknown: a definite answer, unlike other failures."""
    return frozenset(_UNKNOWN_JOB.findall(stderr))


def without_history(stderr: str) -> bool:
    """Whether this PBS keeps no job history, and answers a query for it with no rows (and exit code 0)."""
    return "job_history_enable" in stderr


def over_already(stderr: str) -> bool:
    """Whether ``qdel`` failed because the job has ended."""
    return _OVER.search(stderr) is not None


def surely_refused(stderr: str) -> bool:
    """Whether a failed ``qsub`` left no job. If its connection broke in the middle, it may have left one."""
    return _UNCERTAIN.search(stderr) is None
