"""A private PBS, in a folder: its commands on PATH, all of it removed afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.support.clusters import wait_for
from tests.support.pbs import standin

COMMANDS = ("qsub", "qstat", "qselect", "qdel")


class VirtualPbs:
    """The stand-in of ``standin.py``."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gwp-", dir="/tmp"))
        self.bin = self.folder / "bin"
        self.bin.mkdir()
        for command in COMMANDS:
            program = self.bin / command
            program.write_text(
                f'#!/bin/sh\nPBS_STANDIN={self.folder} exec {sys.executable} -E -S {standin.__file__} {command} "$@"\n'
            )
            program.chmod(0o755)
        self.set(
            slots=2,
            history=True,
            away=False,
            banner="",
            kill_delay_s=5.0,
            queues={"workq": {"walltime": "24:00:00", "nodes": 1}, "prod": {"walltime": "24:00:00", "nodes": 10}},
        )

    def set(self, **values: Any) -> None:
        """Change the stand-in's settings, from now on."""
        file = self.folder / "settings.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        new = file.with_suffix(".new")
        new.write_text(json.dumps({**known, **values}))
        new.rename(file)

    def jobs(self) -> dict[str, Any]:
        """Every job that was ever submitted, by number."""
        file = self.folder / "jobs.json"
        known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return known

    def forget(self) -> None:
        """Lose every ended job, as a server whose history is a fortnight old."""
        kept = {number: job for number, job in self.jobs().items() if job["job_state"] != "F"}
        (self.folder / "jobs.json").write_text(json.dumps(kept))

    def run(self, *argv: str) -> str:
        return subprocess.run([str(self.bin / argv[0]), *argv[1:]], check=True, capture_output=True, text=True).stdout

    def stop(self) -> None:
        """End every job and its keeper."""
        for job in self.jobs().values():
            with contextlib.suppress(ProcessLookupError):
                if job["job_state"] != "F" and job.get("session_id"):
                    os.killpg(job["session_id"], signal.SIGKILL)
        wait_for(lambda: not self._keepers(), "the keepers' end", timeout_s=10, pause_s=0.05)
        shutil.rmtree(self.folder)

    def _keepers(self) -> list[psutil.Process]:
        found = []
        for job in self.jobs().values():
            with contextlib.suppress(psutil.NoSuchProcess, KeyError):
                keeper = psutil.Process(job["keeper"])
                if standin.__file__ in keeper.cmdline() and keeper.status() != psutil.STATUS_ZOMBIE:
                    if job["job_state"] == "Q":
                        keeper.kill()
                    found.append(keeper)
        return found


@contextlib.contextmanager
def virtual_pbs() -> Iterator[VirtualPbs]:
    """A PBS; nothing is left of it afterwards."""
    pbs = VirtualPbs()
    try:
        yield pbs
    finally:
        pbs.stop()
