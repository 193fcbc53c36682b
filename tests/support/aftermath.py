"""After a failed test: the state of its gateways, for its report; and cleanup for the next test."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.gateways import Gateway

LOGS = ("supervisor", "edge", "controller")
LINES = 25
STATUS_WITHIN_S = 20.0
FAILED = pytest.StashKey[str]()
"""Of a test: whether it failed in ``setup`` or ``call``."""

running: list[Gateway] = []
"""The gateways of this process that are not down yet."""


class AtOnce:
    """Shows what failed when it fails, not only at the end: a run of many minutes may be ended before that."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a worker's test too, in the process that has the workers."""
        if report.failed:
            self._terminal.section(f"{report.nodeid} failed in {report.when}", "_")
            self._terminal.write_line(report.longreprtext)
            for title, words in report.sections:
                self._terminal.section(title, "-")
                self._terminal.write_line(words)


def state_of(gateway: Gateway) -> str:
    """The output of ``gateway status``, and the last lines of the most relevant logs."""
    try:
        done = gateway.cli("status", timeout=STATUS_WITHIN_S, check=False)
        said = f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    except subprocess.TimeoutExpired:
        said = f"no answer within {STATUS_WITHIN_S:.0f} s\n"
    parts = [f"--- gateway status: {said}"]
    parts += [f"--- {name}.log\n{last_lines(gateway.layout.logs / f'{name}.log')}" for name in LOGS]
    return "\n".join(parts)


def last_lines(path: Path) -> str:
    """The end of a log, or a note that it is missing."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-LINES:])
    except FileNotFoundError:
        return "(there is none)"
