"""Log files of the gateway's own processes: one JSON line an event, with its fields. 0600, rotated.

Lines that cannot be written are lost, with a message on stderr: a full disk stops no process that logs.
"""

from __future__ import annotations

import logging
import os
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any

_BYTES_MAX = 10_000_000


class _PrivateFile(RotatingFileHandler):
    """Opens the file with its first line: if that fails, only the line is lost."""

    def _open(self) -> Any:
        def private(path: str, flags: int) -> int:
            return os.open(path, flags | os.O_CLOEXEC, 0o600)

        opened: IO[str] = open(self.baseFilename, self.mode, encoding=self.encoding, opener=private)  # noqa: SIM115
        return opened


def log_events(name: str, path: Path) -> None:
    """Write the events of logger ``name`` at INFO and above to ``path``. Once per process and file."""
    from pythonjsonlogger.json import JsonFormatter

    logger = logging.getLogger(name)
    if any(getattr(handler, "baseFilename", None) == str(path) for handler in logger.handlers):
        return
    handler = _PrivateFile(path, maxBytes=_BYTES_MAX, backupCount=2, encoding="utf-8", delay=True)
    handler.setFormatter(JsonFormatter("{asctime}{levelname}{message}", style="{"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
