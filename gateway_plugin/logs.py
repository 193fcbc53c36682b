"""Log files of the gateway's own processes: one JSON line an event, with its fields. 0600, rotated.

What cannot be written is lost, and said on stderr: a full disk stops nobody who logs.
"""

from __future__ import annotations

import logging
import os
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any

_BYTES_MAX = 10_000_000


class _PrivateFile(RotatingFileHandler):
    """Opened with its first line: where that fails, the line is lost, as any that cannot be written."""

    def _open(self) -> Any:
        def private(path: str, flags: int) -> int:
            return os.open(path, flags | os.O_CLOEXEC, 0o600)

        opened: IO[str] = open(self.baseFilename, self.mode, encoding=self.encoding, opener=private)  # noqa: SIM115
        return opened


def log_events(name: str, path: Path) -> None:
    """Send what logger ``name`` says at INFO and above to ``path``. Once a process and file."""
    from pythonjsonlogger.json import JsonFormatter

    logger = logging.getLogger(name)
    if any(getattr(handler, "baseFilename", None) == str(path) for handler in logger.handlers):
        return
    handler = _PrivateFile(path, maxBytes=_BYTES_MAX, backupCount=2, encoding="utf-8", delay=True)
    handler.setFormatter(JsonFormatter("{asctime}{levelname}{message}", style="{"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
