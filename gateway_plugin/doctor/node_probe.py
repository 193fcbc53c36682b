"""``gateway doctor --submit``: a short job of each node type looks at its node, and is cleaned up whatever happens."""

from __future__ import annotations

import contextlib
import copy
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from gateway_plugin.blocks.ledger import Block, BlockPhase
from gateway_plugin.doctor.node_report import REPORT_BYTES, Report, judged, trial_script
from gateway_plugin.doctor.scheduler import versions
from gateway_plugin.errors import GatewayError
from gateway_plugin.paths import Layout, private_folder, write_private
from gateway_plugin.schedulers.base import JobStatus, Scheduler, last_words, shared_script_place
from gateway_plugin.schedulers.select import is_queue, scheduler_for
from gateway_plugin.service.checks import Check, Verdict
from gateway_plugin.service.hearing import Heard, listening, report_in
from gateway_plugin.service.ray_head import head_address
from gateway_plugin.service.undisturbed import undisturbed
from gateway_plugin.site import NodeType, Site

WAIT_S = 600.0
"""How long the jobs may wait in their queues."""

_POLL_S = 0.5
_LATE_S = 10.0
"""How long after its job's end a report may take to show up in a shared folder."""
_END_S = 40.0
_CALL_S = 5.0
_FIND_S = 5.0

Progress = Callable[[tuple[tuple[str, str, str], ...], float], None]
"""Told of ``(what, phase, note)`` rows and the seconds since the beginning."""


@dataclass
class _Trial:
    """One node type's job, and, when it is known, what came of it."""

    node_type: NodeType
    scheduler: Scheduler
    block: Block
    nonce: str
    file: Path
    """Where its report shows up."""
    seen: JobStatus | None = None
    ended_at: float | None = None
    checks: list[Check] = field(default_factory=list)


def try_nodes(
    layout: Layout, site: Site, wait_s: float = WAIT_S, progress: Progress = lambda rows, elapsed_s: None
) -> tuple[Check, ...]:
    """Submit, wait for every node's report, judge it. No job and no file is left, also after Ctrl-C.

    Raises:
        ConfigError: this machine has no address for nodes, or the state folder's path cannot be used.
    """
    queued = [node_type for node_type in site.node_types if is_queue(node_type.provider)]
    if not queued:
        return (Check("trial jobs", Verdict.OK, "none: no node type of this site has a queue"),)
    head, began, token = head_address(site), time.monotonic(), secrets.token_hex(4)
    fresh = not layout.state.exists()
    scripts = private_folder(shared_script_place(layout))
    trials: list[_Trial] = []
    checks: list[Check] = []
    try:
        with listening(head, site.ray_port) as heard:
            for node_type in queued:
                try:
                    _submit(node_type, layout, scripts, token, (head, site.ray_port), heard, trials)
                except (GatewayError, TimeoutError) as error:
                    advice = "correct the node type's provider in the site file"
                    checks.append(Check(f"{node_type.name}: trial job", Verdict.FAIL, str(error), advice))
            while not all(trial.checks for trial in trials):
                elapsed_s = time.monotonic() - began
                for trial in trials:
                    if not trial.checks:
                        _look(trial, heard, elapsed_s, wait_s)
                progress(tuple(_row(trial) for trial in trials), elapsed_s)
                if not all(trial.checks for trial in trials):
                    time.sleep(_POLL_S)
    finally:
        with undisturbed():
            checks += _cleaned_up(trials, scripts, token)
            if fresh:
                for folder in (scripts, scripts.parent, layout.state):
                    with contextlib.suppress(OSError):  # somebody put something into it meanwhile
                        folder.rmdir()
    return (*(check for trial in trials for check in trial.checks), *checks)


def _submit(
    node_type: NodeType,
    layout: Layout,
    scripts: Path,
    token: str,
    head: tuple[str, int],
    heard: Heard,
    trials: list[_Trial],
) -> None:
    """Add the node type's to ``trials`` before its job is submitted, so that Ctrl-C leaves none that nobody knows.

    Raises ``ServiceError``, ``ConfigError``: there is no job. ``TimeoutError``: none was found, and one may come.
    """
    provider: Any = copy.copy(node_type.provider)
    provider.resources = {}
    provider.walltime = _walltime(provider)
    scheduler = scheduler_for(provider, layout)
    name, nonce = f"gwtrial-{node_type.name}-{token}", secrets.token_hex(16)
    write_private(scripts / f"{name}.marker", nonce)
    script = trial_script(
        node_type.worker_init, scripts / f"{name}.marker", scripts / f"{name}.report", nonce, *head, heard.talk
    )
    block = Block(name=name, type=node_type.name, phase=BlockPhase.PENDING, asked_at=time.time())
    trial = _Trial(node_type, scheduler, block, nonce, scripts / f"{name}.report")
    trials.append(trial)
    heard.expected.add(nonce)
    try:
        trial.block = replace(block, job=scheduler.submit(name, script))
    except GatewayError:
        trials.remove(trial)
        raise
    except TimeoutError:
        _find(trial)
        if trial.block.job is None:
            trials.remove(trial)
            raise


def _find(trial: _Trial) -> None:
    """Look for a job whose submit was cut short, for as long as one may take to show up on a quiet site."""
    until = time.monotonic() + _FIND_S
    while trial.block.job is None and time.monotonic() < until:
        with contextlib.suppress(GatewayError):  # it cannot be asked now
            trial.block = replace(trial.block, job=trial.scheduler.find(trial.block.name))
        time.sleep(_POLL_S)


def _walltime(provider: Any) -> str:
    """A minute; PBS queues do not take jobs that short (Polaris wants five)."""
    from parsl.providers import SlurmProvider

    return "00:01:00" if isinstance(provider, SlurmProvider) else "00:05:00"


def _look(trial: _Trial, heard: Heard, elapsed_s: float, wait_s: float) -> None:
    """One look: (1) it reported: judged. (2) its job ended and no report came. (3) it waited too long."""
    report = heard.reports.get(trial.nonce) or _read(trial.file, trial.nonce)
    trial.seen = trial.scheduler.status([trial.block]).get(trial.block.name, trial.seen)
    name, seen = f"{trial.node_type.name}: trial job", trial.seen
    if report is not None:  # (1)
        now_s = heard.times.get(trial.nonce, report.time_s)
        trial.checks.append(Check(name, Verdict.OK, f"ran on {report.host} after {elapsed_s:.0f} s"))
        trial.checks += judged(trial.node_type, report, here(), _call(report), now_s)
    elif seen is not None and seen.phase.ended:  # (2)
        trial.ended_at = elapsed_s if trial.ended_at is None else trial.ended_at
        if elapsed_s - trial.ended_at > _LATE_S:
            output = Path(f"{trial.block.job.script}.stderr") if trial.block.job and trial.block.job.script else None
            words = f"{seen.reason or seen.phase.value}{last_words(output) if output is not None else ''}"
            advice = "worker_init= of the node type; or the node does not see the state folder"
            trial.checks.append(Check(name, Verdict.FAIL, f"no report from {seen.node or 'its node'}: {words}", advice))
    elif elapsed_s > wait_s:  # (3)
        words = f"did not run within {wait_s:.0f} s: {seen.reason or seen.phase.value if seen else 'nothing is said'}"
        trial.checks.append(Check(name, Verdict.WARN, words, "it was cancelled; --wait gives it longer"))


def here() -> dict[str, str]:
    """Versions on this machine."""
    return {**versions(), "gateway-plugin": metadata.version("gateway-plugin")}


def _row(trial: _Trial) -> tuple[str, str, str]:
    if trial.checks:
        return trial.node_type.name, trial.checks[0].verdict.value, trial.checks[0].found
    seen = trial.seen
    return trial.node_type.name, "submitted" if seen is None else seen.phase.value, (seen and seen.reason) or ""


def _read(file: Path, nonce: str) -> Report | None:
    try:
        return report_in(file.read_bytes()[:REPORT_BYTES], {nonce})
    except OSError:
        return None


def _call(report: Report) -> str:
    """``reached``, or why the node is not."""
    if not report.address:
        return "its address is not known"
    try:
        socket.create_connection((report.address, report.port), timeout=_CALL_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return "reached"


def _cleaned_up(trials: list[_Trial], scripts: Path, token: str) -> tuple[Check, ...]:
    """Every job is told to end and seen to have ended, every file of the trial is removed. Tells what is left."""
    until = time.monotonic() + _END_S
    for trial in trials:
        _find(trial)
    left = [trial for trial in trials if trial.block.job and not (trial.seen and trial.seen.phase.ended)]
    while left:
        for trial in left:
            trial.scheduler.cancel(trial.block, forced=False)
            trial.seen = trial.scheduler.status([trial.block]).get(trial.block.name, trial.seen)
        left = [trial for trial in left if not (trial.seen and trial.seen.phase.ended)]
        if left and time.monotonic() > until:
            break
        if left:
            time.sleep(_POLL_S)
    for file in scripts.glob(f"gwtrial-*-{token}.*"):
        file.unlink(missing_ok=True)
    return tuple(
        Check(
            f"{trial.node_type.name}: trial job",
            Verdict.WARN,
            f"job {trial.block.job.id if trial.block.job else '?'} was told to end and is not seen to have ended",
            "look at it with the scheduler's own commands",
        )
        for trial in left
    )
