"""Marks that tell blocks to be gone: a file named after the block, in the shared state folder.

A block that gets SIGTERM looks for its mark: there, it was the gateway that cancelled it, and it leaves at once; not
there, it was somebody else, and it lets its requests end first. It looks now and then without being told, too: where
Slurm killed a job whose processes live on (its ``slurmd`` died), no signal reaches it any more.
"""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)


class LeaveMarks:
    """The marks in ``folder``, which ``Layout.make`` makes. Old ones are removed with the logs of their blocks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, block: str) -> None:
        """Mark ``block``. Where that fails it is told by signal all the same, and only leaves later."""
        try:
            (self._folder / block).touch(mode=0o600)
        except OSError as error:
            log.warning("block not marked name=%s said=%s", block, error)
