"""What the controller writes down: its epoch, the administrator's pins, and its events for ``controller replay``.

Everything else it can be told again by the agents and the edge.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

from gateway_plugin.layout import write_private
from serve.core.events import Event
from serve.core.record import event_to_json

_LOG_BYTES_MAX = 20_000_000


class Journal:
    """Files in the controller's folder. Small, synchronous, on the state folder's disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log: IO[str] | None = None
        self._written = 0

    def next_epoch(self) -> int:
        """One more than the last controller's."""
        path = self._folder / "epoch"
        epoch = (int(path.read_text()) if path.exists() else 0) + 1
        write_private(path, str(epoch))
        return epoch

    def pins(self) -> tuple[frozenset[str], frozenset[str]]:
        """Models that an administrator pinned, and those of the catalog's pins that one took back."""
        path = self._folder / "wishes.json"
        if not path.exists():
            return frozenset(), frozenset()
        kept = json.loads(path.read_text())
        return frozenset(kept["pinned"]), frozenset(kept["unpinned"])

    def keep_pins(self, pinned: frozenset[str], unpinned: frozenset[str]) -> None:
        """Keep them for the next controller."""
        write_private(
            self._folder / "wishes.json", json.dumps({"pinned": sorted(pinned), "unpinned": sorted(unpinned)})
        )

    def record(self, event: Event, now: float) -> None:
        """Append one event. The log is kept to twice ``_LOG_BYTES_MAX``: the current file and the one before."""
        line = json.dumps({"at": now, **event_to_json(event)}, separators=(",", ":")) + "\n"
        if self._log is None or self._written > _LOG_BYTES_MAX:
            self._log = self._open()
        self._log.write(line)
        self._log.flush()
        self._written += len(line)

    def _open(self) -> IO[str]:
        path = self._folder / "events.jsonl"
        if self._log is not None:
            self._log.close()
        if path.exists() and path.stat().st_size > 0:
            path.replace(self._folder / "events.1.jsonl")
        path.touch(mode=0o600)
        self._written = 0
        return path.open("a", encoding="utf-8")
