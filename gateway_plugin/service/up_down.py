"""``gateway up`` and ``gateway down``: start all parts, and end all parts.

``up`` numbers its cases: (1) an invalid catalog or site: no start; (2) a supervisor lives: it is up, or will be, or was
started for something else; (3) its supervisor died and parts live on: adopted; (4) nothing lives: a fresh start; (5) it
does not come up: all parts that this ``up`` started are ended, and the reason given.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from gateway_plugin.catalog import Catalog
from gateway_plugin.edge import process as edge_process
from gateway_plugin.engine_records import end_engines
from gateway_plugin.errors import ConfigError, GatewayError, ServiceError
from gateway_plugin.paths import Layout, private_folder
from gateway_plugin.processes import alive, end, mark
from gateway_plugin.service.active_catalog import Chosen, choose, in_force, own_catalog, remember
from gateway_plugin.service.deployment import deployment_of, forget, planned, provision
from gateway_plugin.service.discovery import edges_of, supervisors_of
from gateway_plugin.service.draining import GRACE_S, Drain, let_finish
from gateway_plugin.service.preflight import before_start, failures, few_files
from gateway_plugin.service.startup import Progress, Report, wait_until_ready
from gateway_plugin.service.teardown import end_everything, has_blocks, head_runs, shielded_from_signals
from gateway_plugin.service_state import ServiceRecord, record_here, recover_record
from gateway_plugin.site import Site
from gateway_plugin.sizing.catalog_file import read_catalog

UP_TIMEOUT_S = 300.0
DOWN_TIMEOUT_S = 90.0
_POLL_S = 0.2


class Outcome(StrEnum):
    """How ``up`` or ``down`` ended."""

    STARTED = "started"
    ALREADY_UP = "already up"
    ADOPTED = "adopted"
    """The supervisor is new; live parts were taken over."""
    ENDED = "ended"
    NOTHING_RAN = "nothing ran"


@dataclass(frozen=True)
class Result:
    """The result of ``up`` or ``down``."""

    outcome: Outcome
    url: str
    seconds: float
    note: str = ""
    """A further message for the user."""
    drain: Drain | None = None
    """Of ``down``: the outcome of the requests in flight."""


def up(
    state: Path,
    site_reference: str | None,
    models: Path | None,
    *,
    port: int | None = None,
    timeout_s: float = UP_TIMEOUT_S,
    report: Report = lambda progress: None,
) -> Result:
    """Start the gateway and wait until it serves.

    Without ``site_reference`` and ``models``, those of the last ``up`` in this state folder are used, else ``local``
    and ``models.yaml``.

    Raises:
        ConfigError: catalog or site are invalid; nothing was started.
        ServiceError: a check failed, something else runs, or it did not come up (and was ended again).
    """
    began = time.monotonic()
    layout = Layout.of(state)
    mended = recover_record(layout) if layout.state.is_dir() else ""
    known = record_here(layout) if layout.state.is_dir() else None
    if mended and known is None and site_reference is None:
        raise ServiceError(f"nothing was started: {mended}")
    gateway = planned(layout, known, site_reference, port)
    site = gateway.site
    if models is None and known is not None and known.catalog:  # (1)
        chosen = choose(layout, Path(known.catalog), _anything_lives(layout, site), site)
    else:
        file = models or own_catalog()

        def tell(models: int) -> None:
            steps = (("catalog", "sizing", f"{models} models"),)
            report(Progress(steps, time.monotonic() - began))

        chosen = Chosen(file, read_catalog(file, site, report=tell), from_file=True)
    chosen = replace(chosen, note=" ".join(filter(None, (mended, chosen.note))))
    private_folder(layout.state)
    with _locked(layout):
        known = record_here(layout)
        gateway = gateway.with_catalog(chosen.file)
        supervisors = supervisors_of(layout)
        living = _anything_lives(layout, site)
        if living and known is not None:
            _refuse_another(layout, known, gateway.record, chosen.catalog)
        if edges_of(layout) and not edge_process.of_this_version(layout):
            raise ServiceError(
                "an edge of another version or another GATEWAY_RUN_ROOT runs: 'gateway down' first, then up again."
            )
        if supervisors and known is None:
            raise ServiceError(
                f"a supervisor runs (PID {supervisors[0].pid}) and {layout.service_json}, which says for what, is "
                "missing: it writes it again once there is room on that disk; or 'gateway down' first."
            )
        if supervisors and known is not None:  # (2)
            wait_until_ready(layout, None, timeout_s, began, report)
            return Result(Outcome.ALREADY_UP, known.url, time.monotonic() - began, chosen.note)
        failed = failures(before_start(layout, site, chosen.catalog, ports_held(layout, site)))
        if failed:
            words = "; ".join(f"{check.name}: {check.found}. {check.advice}" for check in failed)
            raise ServiceError(f"nothing was started: {words}")
        if not living:
            end_engines(layout.engine_records, grace_s=5.0)  # left by a block that was killed
        supervisor = None
        try:
            recovered = provision(gateway, chosen.catalog, keep=living)
            note = " ".join(filter(None, (chosen.note, recovered, few_files(site.limits))))
            remember(layout, chosen)
            supervisor = _start_supervisor(layout)
            wait_until_ready(layout, supervisor, timeout_s, began, report)
        except (GatewayError, OSError, KeyboardInterrupt) as error:  # (5)
            with shielded_from_signals():
                _undo(layout, site, supervisor, everything=not living)
            if supervisor is None or not isinstance(error, GatewayError):
                raise
            raise ServiceError(f"{error.message}\nlogs: {layout.logs}") from None
        outcome = Outcome.ADOPTED if living else Outcome.STARTED  # (3), (4)
        return Result(outcome, gateway.record.url, time.monotonic() - began, note)


def down(
    state: Path,
    *,
    grace_s: float = GRACE_S,
    forced: bool = False,
    timeout_s: float = DOWN_TIMEOUT_S,
    hurry: threading.Event | None = None,
    report: Report = lambda progress: None,
) -> Result:
    """End everything that belongs to the gateway in ``state``, with or without its supervisor.

    Requests in flight have ``grace_s`` to end, or until ``hurry`` is set; new ones are rejected meanwhile. ``forced``
    ends them at once. ``timeout_s`` counts from there.

    Raises:
        ServiceError: something could not be ended; names it.
    """
    began = time.monotonic()
    layout = Layout.of(state)
    if not layout.state.is_dir():
        return Result(Outcome.NOTHING_RAN, "", 0.0)

    def tell(what: str) -> None:
        report(Progress(((what, "ending", ""),), time.monotonic() - began))

    def tell_drain(found: Drain) -> None:
        note = f"{found.in_flight} in flight, {found.left_s:.0f} s left"
        report(Progress((("requests", "draining", note),), time.monotonic() - began, drain=found))

    with _locked(layout):
        private_folder(layout.run)  # this user's own from here on: files removed below are in no other user's folder
        mended = recover_record(layout)
        record = record_here(layout)
        url = record.url if record is not None else ""
        site = _site_or_none(layout, record)
        supervisors = supervisors_of(layout)
        if not _anything_lives(layout, site):
            # Engines without an agent, sockets.
            _all_ended(end_everything(layout, site, lambda what: None, forced=True), forced)
            forget(layout)
            shutil.rmtree(layout.run, ignore_errors=True)
            return Result(Outcome.NOTHING_RAN, url, time.monotonic() - began, mended)
        drained = None
        if not forced:
            drained = let_finish(layout, supervisors, grace_s, hurry or threading.Event(), tell_drain)
            deadline = time.monotonic() + timeout_s
            while any(alive(known) for known in supervisors) and time.monotonic() < deadline:
                tell("head, blocks, edge")
                time.sleep(_POLL_S)
        end(supervisors, grace_s=0.0)
        _all_ended(end_everything(layout, site, tell, forced=forced), forced)
        forget(layout)
        shutil.rmtree(layout.run, ignore_errors=True)
        return Result(Outcome.ENDED, url, time.monotonic() - began, mended, drained)


def _all_ended(left: tuple[str, ...], forced: bool) -> None:
    """Raises ``ServiceError`` if anything is left: then its records must stay, so that it is found again."""
    if left:
        advice = "End that by hand, then run it again." if forced else "Try 'gateway down --force'."
        raise ServiceError(f"could not be ended: {', '.join(left)}. {advice}")


def _site_or_none(layout: Layout, record: ServiceRecord | None) -> Site | None:
    try:
        return None if record is None else deployment_of(layout, record).site
    except ConfigError:
        return None


def _anything_lives(layout: Layout, site: Site | None) -> bool:
    return bool(supervisors_of(layout) or edges_of(layout) or head_runs(layout) or has_blocks(layout, site))


def ports_held(layout: Layout, site: Site) -> frozenset[int]:
    """The site's ports that live parts of this gateway hold."""
    edge = {site.port} if edges_of(layout) else set()
    head = {site.ray_port} if head_runs(layout) else set()
    return frozenset(edge | head)


def _refuse_another(layout: Layout, known: ServiceRecord, wanted: ServiceRecord, catalog: Catalog) -> None:
    if known.contradicts(wanted):
        raise ServiceError(
            f"a gateway with another site or port (site {known.site_reference}, {known.url}) runs in {layout.state}: "
            "'gateway down' first, or give another --state."
        )
    present = in_force(layout)
    if present is not None and present != catalog:
        raise ServiceError(
            f"the gateway is up at {known.url} with another catalog: 'gateway models apply {wanted.catalog}' "
            "changes the models while it runs; or 'gateway down' first."
        )


def _start_supervisor(layout: Layout) -> subprocess.Popen[bytes]:
    argv = (sys.executable, "-m", "gateway_plugin.service.supervisor", "--state", str(layout.state))
    descriptor = os.open(layout.supervisor_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "ab") as output:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd="/"
        )


def _undo(layout: Layout, site: Site, started: subprocess.Popen[bytes] | None, everything: bool) -> None:
    """End the parts that this ``up`` started, and remove the run folder, unless something cannot be ended. Earlier ones
    stay: streams may pass through them."""
    if started is not None and (own := mark(started.pid)) is not None:
        end((own,), grace_s=0.0)
    if everything:
        left = end_everything(layout, site, lambda what: None)
        forget(layout)
        if not left:
            shutil.rmtree(layout.run, ignore_errors=True)


@contextlib.contextmanager
def _locked(layout: Layout) -> Iterator[None]:
    """One ``up`` or ``down`` at a time. Raises ``ServiceError`` if another is running."""
    descriptor = os.open(layout.service_lock, os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceError(f"another 'gateway up' or 'down' is at work in {layout.state}; wait for it.") from None
        yield
