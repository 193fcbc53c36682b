"""Files that request the end of a block, named like it: from the controller to the pool, and from the pool to the
block.

The pool alone writes the ledger and ends jobs, in Ray's monitor process, which cannot be called: the controller leaves
a request, and the pool finds it at its next refresh, two seconds later, or after a restart.

A block that receives SIGTERM checks for its mark: with it, the gateway cancelled the block, which ends at once;
without, others did, and it drains its requests first. It also checks every ten seconds: if Slurm gave up a job whose
processes live on (its ``slurmd`` died), signals no longer reach it.
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
        """Request the end of ``block``. Raises ``OSError``, ``ServiceError`` if the folder cannot be written."""
        write_private(private_folder(self._folder) / block, f"{time.time():.0f}\n")

    def names(self) -> tuple[str, ...]:
        """The blocks with a request, by name. Raises ``OSError``."""
        try:
            return tuple(sorted(path.name for path in self._folder.iterdir() if not path.name.startswith(".")))
        except FileNotFoundError:
            return ()

    def done(self, block: str) -> None:
        """Remove a request: the pool has recorded that ``block`` is to end. Raises ``OSError``."""
        (self._folder / block).unlink(missing_ok=True)


def mark_to_leave(folder: Path, block: str) -> None:
    """Mark ``block`` in ``folder``, which ``Layout.make`` creates. If that fails, it still receives the signal, and
    only drains first. Old marks are removed with the logs of their blocks.
    """
    try:
        (folder / block).touch(mode=0o600)
    except OSError as error:
        log.warning("block not marked name=%s said=%s", block, error)
