"""Files that say that a block is to end, each named like the block: the controller's to the pool, the pool's to it.

The pool alone writes the ledger and ends jobs, in Ray's monitor process, which cannot be called: the controller leaves
a request, and the pool finds it at its next refresh, two seconds later, or after a restart.

A block that gets SIGTERM looks for its mark: with it, the gateway cancelled it, and it leaves at once; without, others
did, and it lets its requests end first. It looks every ten seconds, too: where Slurm gave up a job whose processes live
on (its ``slurmd`` died), no signal reaches it any more.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from gateway_plugin.paths import private_folder, write_private

log = logging.getLogger(__name__)


class CancelRequests:
    """The folder of requests. Calls block as long as the file system does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def ask(self, block: str) -> None:
        """Ask for ``block`` to be ended. Raises ``OSError``, ``ServiceError`` where the folder cannot be written."""
        write_private(private_folder(self._folder) / block, f"{time.time():.0f}\n")

    def names(self) -> tuple[str, ...]:
        """The blocks that are asked to end, by name. Raises ``OSError``."""
        try:
            return tuple(sorted(path.name for path in self._folder.iterdir() if not path.name.startswith(".")))
        except FileNotFoundError:
            return ()

    def done(self, block: str) -> None:
        """The pool has written down that ``block`` is to end. Raises ``OSError``."""
        (self._folder / block).unlink(missing_ok=True)


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
