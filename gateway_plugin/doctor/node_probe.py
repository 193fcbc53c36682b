"""``gateway doctor --submit``: one job of each node type, with a block's script, checks its node and is cleaned up."""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from parsl.providers import SlurmProvider
from pydantic import ValidationError

from gateway_plugin.blocks.job_script import block_script
from gateway_plugin.blocks.ledger import Block
from gateway_plugin.blocks.self_check import PACKAGES, call, version, wanted_file
from gateway_plugin.catalog import Catalog
from gateway_plugin.doctor.node_report import REPORT_BYTES, Report, judged
from gateway_plugin.doctor.scheduler import versions
from gateway_plugin.errors import GatewayError
from gateway_plugin.paths import Layout, private_folder, write_private
from gateway_plugin.phases import BlockPhase
from gateway_plugin.runtimes.versions import wanted
from gateway_plugin.schedulers.base import JobStatus, Scheduler, shared_script_place
from gateway_plugin.schedulers.select import is_queue, schedulers_for
from gateway_plugin.service.checks import Check, Verdict
from gateway_plugin.service.ray_head import head_address
from gateway_plugin.service.teardown import shielded_from_signals
from gateway_plugin.site import NodeType, Site

WAIT_S = 600.0
"""How long the jobs may pend."""

_POLL_S = 0.5
_LATE_S = 10.0
"""How long after its job's end a report may take to appear in a shared folder."""
_END_S = 40.0
_CALL_S = 5.0
_FIND_S = 5.0

_NO_MODELS = Catalog(models=())

Progress = Callable[[tuple[tuple[str, str, str], ...], float], None]
"""Receives ``(what, phase, note)`` rows and the seconds since the beginning."""


@dataclass
class _Trial:
    """One node type's job, and its result once known."""

    node_type: NodeType
    scheduler: Scheduler
    block: Block
    file: Path
    """The path of its report."""
    status: JobStatus | None = None
    ended_at: float | None = None
    checks: list[Check] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.status is not None and self.status.phase.ended


def try_nodes(
    layout: Layout,
    site: Site,
    wait_s: float = WAIT_S,
    progress: Progress = lambda rows, elapsed_s: None,
    catalog: Catalog = _NO_MODELS,
) -> tuple[Check, ...]:
    """Submit, wait for every node's report, judge it. No job and no file is left, also after Ctrl-C.

    Args:
        catalog: its runtimes are started on each node, for their versions.

    Raises:
        ConfigError: this machine has no address for nodes, or the state folder's path cannot be used.
    """
    queued = [_short(node_type) for node_type in site.node_types if is_queue(node_type.provider)]
    if not queued:
        return (Check("trial jobs", Verdict.OK, "none: no node type of this site has a queue"),)
    head, began, token = head_address(site), time.monotonic(), secrets.token_hex(4)
    folders = (shared_script_place(layout), layout.logs)
    fresh = [place for folder in folders for place in (folder, folder.parent, layout.state) if not place.exists()]
    scripts, _ = (private_folder(folder) for folder in folders)
    trials: list[_Trial] = []
    checks: list[Check] = []
    try:
        with _listening(head, site.ray_port):
            schedulers = schedulers_for(queued, layout)
            for node_type in queued:
                name = f"gwtrial-{node_type.name}-{token}"
                block = Block(name=name, type=node_type.name, phase=BlockPhase.PENDING, asked_at=time.time())
                trial = _Trial(node_type, schedulers[node_type.name], block, scripts / f"{name}.report")
                trials.append(trial)  # before its job is submitted, so that Ctrl-C leaves none unknown
                try:
                    write_private(wanted_file(trial.file), wanted(catalog).model_dump_json())
                    _submit(trial, layout, f"{head}:{site.ray_port}")
                except (GatewayError, TimeoutError) as error:
                    trials.remove(trial)
                    advice = "correct the node type's provider in the site file"
                    checks.append(Check(f"{node_type.name}: trial job", Verdict.FAIL, str(error), advice))
            while not all(trial.checks for trial in trials):
                elapsed_s = time.monotonic() - began
                for trial in trials:
                    if not trial.checks:
                        _look(trial, elapsed_s, wait_s)
                progress(tuple(_row(trial) for trial in trials), elapsed_s)
                if not all(trial.checks for trial in trials):
                    time.sleep(_POLL_S)
    finally:
        with shielded_from_signals():
            checks += _cleaned_up(trials)
            for file in (*scripts.glob(f"gwtrial-*-{token}.*"), *layout.logs.glob(f"block-gwtrial-*-{token}.log")):
                file.unlink(missing_ok=True)
            for folder in fresh:
                with contextlib.suppress(OSError):  # it holds something else by now
                    folder.rmdir()
    return (*(check for trial in trials for check in trial.checks), *checks)


@contextlib.contextmanager
def _listening(head: str, port: int) -> Iterator[None]:
    """Listen on the address that blocks will use. If the gateway runs, its own port is there for the nodes to call."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(socket.create_server((head, port), backlog=64))
        yield


def _short(node_type: NodeType) -> NodeType:
    """With a walltime of a minute; PBS queues do not take jobs that short (Polaris wants five)."""
    provider: Any = copy.copy(node_type.provider)
    provider.resources = {}
    provider.walltime = "00:01:00" if isinstance(provider, SlurmProvider) else "00:05:00"
    return node_type.model_copy(update={"provider": provider})


def _submit(trial: _Trial, layout: Layout, head: str) -> None:
    """Raises ``ServiceError``, ``ConfigError``: there is no job. ``TimeoutError``: none was found, and one may still
    appear."""
    name = trial.block.name
    script = block_script(name, trial.node_type, layout, head, report=str(trial.file))
    try:
        trial.block = replace(trial.block, job=trial.scheduler.submit(name, script))
    except TimeoutError:
        _find(trial)
        if trial.block.job is None:
            raise


def _find(trial: _Trial) -> None:
    """Search for a job with an interrupted submit, for as long as one may take to appear on a quiet site."""
    until = time.monotonic() + _FIND_S
    while trial.block.job is None and time.monotonic() < until:
        with contextlib.suppress(GatewayError):  # the scheduler does not answer now
            trial.block = replace(trial.block, job=trial.scheduler.find(trial.block.name))
        time.sleep(_POLL_S)


def _ask(trial: _Trial) -> None:
    trial.status = trial.scheduler.status([trial.block]).get(trial.block.name, trial.status)


def _look(trial: _Trial, elapsed_s: float, wait_s: float) -> None:
    """One poll: (1) it reported: judged. (2) its job ended without a report. (3) it waited too long."""
    report = _read(trial.file)
    _ask(trial)
    name, status = f"{trial.node_type.name}: trial job", trial.status
    if report is not None:  # (1)
        called = call(report.address, report.port, _CALL_S)
        trial.checks.append(Check(name, Verdict.OK, f"ran on {report.host} after {elapsed_s:.0f} s"))
        here = {**versions(), **{package: version(package) for package in PACKAGES}}
        trial.checks += judged(trial.node_type, report, here, called, time.time())
    elif status is not None and trial.over:  # (2)
        trial.ended_at = elapsed_s if trial.ended_at is None else trial.ended_at
        if elapsed_s - trial.ended_at > _LATE_S:
            words = f"no report from {status.node or 'its node'}: {status.reason or status.phase.value}"
            advice = "worker_init= of the node type; or the node does not see the state folder (--state, GATEWAY_STATE)"
            trial.checks.append(Check(name, Verdict.FAIL, words, advice))
    elif elapsed_s > wait_s:  # (3)
        words = f"did not run within {wait_s:.0f} s: {status.reason or status.phase.value if status else 'no status'}"
        trial.checks.append(Check(name, Verdict.WARN, words, "it was cancelled; --wait gives it longer"))


def _row(trial: _Trial) -> tuple[str, str, str]:
    if trial.checks:
        return trial.node_type.name, trial.checks[0].verdict.value, trial.checks[0].found
    status = trial.status
    return trial.node_type.name, "submitted" if status is None else status.phase.value, (status and status.reason) or ""


def _read(file: Path) -> Report | None:
    """The report; ``None``: there is none yet."""
    try:
        os.scandir(file.parent).close()  # opening the folder makes a client of NFS ask its server again
        return Report.model_validate_json(file.read_bytes()[:REPORT_BYTES])
    except (OSError, ValidationError):
        return None


def _cleaned_up(trials: list[_Trial]) -> tuple[Check, ...]:
    """Every job is cancelled and its end awaited; jobs that have not ended are listed."""
    until = time.monotonic() + _END_S
    for trial in trials:
        _find(trial)
    left = [trial for trial in trials if trial.block.job and not trial.over]
    while left and time.monotonic() < until:
        for trial in left:
            trial.scheduler.cancel(trial.block, forced=False)
            _ask(trial)
        if left := [trial for trial in left if not trial.over]:
            time.sleep(_POLL_S)
    return tuple(
        Check(
            f"{trial.node_type.name}: trial job",
            Verdict.WARN,
            f"job {trial.block.job.id if trial.block.job else '?'} was cancelled and is not seen to have ended",
            "look at it with the scheduler's own commands",
        )
        for trial in left
    )
