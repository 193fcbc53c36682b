"""Waiting until the gateway serves: the progress display, and when ``up`` gives up."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway_plugin.errors import ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.processes import mark
from gateway_plugin.service.discovery import supervisors_of
from gateway_plugin.service.draining import Drain
from gateway_plugin.service.logs import last_lines
from gateway_plugin.service.restart_policy import Phase
from gateway_plugin.service.status import is_ready
from gateway_plugin.service.supervisor_state import PartState, read_status

_DEATHS_GIVEN_UP = 4
_POLL_S = 0.2


@dataclass(frozen=True)
class Progress:
    """The state of a wait, for a display: part -> (phase, message). ``done``: the gateway serves, or has ended."""

    parts: tuple[tuple[str, str, str], ...]
    elapsed_s: float
    done: bool = False
    drain: Drain | None = None
    """While requests in flight drain."""


Report = Callable[[Progress], None]


def wait_until_ready(
    layout: Layout,
    started: subprocess.Popen[bytes] | None,
    timeout_s: float,
    began: float,
    report: Report,
) -> None:
    """Return once the gateway serves. ``began``: by ``time.monotonic()``.

    Args:
        started: the supervisor, if it was started just now; else a live one is waited for.

    Raises:
        ServiceError: it ends, or does not come up within ``timeout_s``; gives the reason and the end of the relevant
            log.
    """
    own = mark(started.pid) if started is not None else None
    while True:
        elapsed_s = time.monotonic() - began
        status = read_status(layout)
        if started is None and (status.stage == "stopping" or not supervisors_of(layout)):
            raise ServiceError(
                "the gateway is being ended: 'gateway up' again once 'gateway status' says that it is down."
            )
        parts = status.parts if own is None or status.supervisor == own else {}
        ready = bool(parts) and is_ready(layout)
        report(_progress(parts, ready, elapsed_s))
        if ready:
            return
        if started is not None and started.poll() is not None:
            raise ServiceError(_why("supervisor", f"ended with exit code {started.returncode}", layout.supervisor_log))
        for name, part in parts.items():
            if part.deaths >= _DEATHS_GIVEN_UP or (name == "serve" and part.deaths >= 2):
                raise ServiceError(_why(name, part.last_error, log_of_part(layout, name)))
        if elapsed_s > timeout_s:
            waiting = next((name for name, part in parts.items() if part.phase is not Phase.RUNNING), "serve")
            why = _why(waiting, f"not ready within {timeout_s:.0f} s", log_of_part(layout, waiting))
            raise ServiceError(why)
        time.sleep(_POLL_S)


def log_of_part(layout: Layout, part: str) -> Path:
    """The log with the reason why a part does not come up."""
    logs = {"edge": layout.edge_log, "head": layout.head_log, "serve": layout.deploy_log}
    return logs.get(part, layout.supervisor_log)


def _why(part: str, what: str, log: Path) -> str:
    lines = "".join(f"\n    {line}" for line in last_lines(log, 8))
    return f"{part}: {what}. Last lines of {log}:{lines or ' (empty)'}"


_TITLES = (("edge", "edge"), ("head", "Ray head"), ("serve", "application"))


def _progress(parts: Mapping[str, PartState], ready: bool, elapsed_s: float) -> Progress:
    rows = [("supervisor", "running" if parts else "starting", "")]
    for name, title in _TITLES:
        part = parts.get(name, PartState())
        waiting = name == "serve" and part.phase is Phase.DOWN and not part.last_error
        rows.append((title, "waiting" if waiting or not parts else part.phase.value, part.last_error))
    rows.append(("ready", "running" if ready else "waiting", ""))
    return Progress(tuple(rows), elapsed_s, ready)
