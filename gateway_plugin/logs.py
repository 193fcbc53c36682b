"""Log files of the gateway's own processes: one JSON line an event, with its fields. 0600, rotated."""

from __future__ import annotations

import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

_BYTES_MAX = 10_000_000


def log_events(name: str, path: Path) -> None:
    """Send what logger ``name`` says at INFO and above to ``path``. Once a process and file."""
    from pythonjsonlogger.json import JsonFormatter

    logger = logging.getLogger(name)
    if any(getattr(handler, "baseFilename", None) == str(path) for handler in logger.handlers):
        return
    path.touch(mode=0o600, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=_BYTES_MAX, backupCount=2, encoding="utf-8")
    handler.setFormatter(JsonFormatter("{asctime}{levelname}{message}", style="{"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
