"""Requests to end a block at once: one file each, named like the block, in ``blocks/cancel`` of the state folder.

The pool alone writes the ledger and ends jobs, in Ray's monitor process, which cannot be called: the controller leaves
a file, and the pool finds it when it looks at its jobs the next time, two seconds later, or after a restart.
"""

from __future__ import annotations

import time
from pathlib import Path

from gateway_plugin.paths import private_folder, write_private


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
