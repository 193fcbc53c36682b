"""The endpoint's own process, Globus's: its start, and its last output."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

from gateway_plugin.errors import ServiceError
from gateway_plugin.globus.endpoint import config_files as config
from gateway_plugin.globus.endpoint import venv as environment
from gateway_plugin.processes import Mark, mark


def spawn(folder: Path, venv: Path) -> Mark:
    """Start the endpoint that is configured in ``folder``, with the program of ``venv``, in a session of its own.

    Raises ``ServiceError`` if it ends at once.
    """
    with (folder / "console.log").open("wb") as log:
        (folder / "console.log").chmod(0o600)
        child = subprocess.Popen(
            [str(environment.program(venv)), "start", folder.name],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=config.process_environment(os.environ, venv, folder.parent),
            cwd=folder,
            start_new_session=True,
        )
    found = mark(child.pid)
    if found is None:
        child.wait()
        raise ServiceError(f"The endpoint '{folder.name}' ended at once:\n{last_words(folder)}")
    return found


def last_words(folder: Path) -> str:
    """The last lines of its console and its log, for people."""
    lines: list[str] = []
    for name in ("console.log", "endpoint.log"):
        with suppress(OSError):
            lines += (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()[-6:]
    return "\n".join(lines) or "(it said nothing)"
