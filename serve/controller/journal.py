"""What the controller writes down: its epoch, the administrator's pins, and its events for ``controller replay``.

Everything else it can be told again by the agents and the edge.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import IO

from gateway_plugin.layout import write_private
from serve.core.cards import Cards, cards_from_json, cards_to_json
from serve.core.events import CatalogChanged, Event
from serve.core.record import event_to_json

log = logging.getLogger("gateway.controller")

_LOG_BYTES_MAX = 20_000_000


class Journal:
    """Files in the controller's folder. Small, synchronous, on the state folder's disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log: IO[str] | None = None
        self._written = 0
        self._broken = False

    def next_epoch(self) -> int:
        """One more than the last controller's."""
        path = self._folder / "epoch"
        epoch = (int(path.read_text()) if path.exists() else 0) + 1
        try:
            write_private(path, str(epoch))
        except OSError:
            log.exception("journal-unwritable", extra={"path": str(path)})
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

    def cards(self) -> Cards:
        """What the last controller knew of the catalog's models; nothing where that cannot be read."""
        path = self._folder / "cards.json"
        try:
            return cards_from_json(json.loads(path.read_text())) if path.exists() else {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            log.exception("cards-unreadable", extra={"path": str(path)})
            return {}

    def keep_cards(self, cards: Cards) -> None:
        """Keep them for the next controller. Where the disk is full, they are known to this one alone."""
        path = self._folder / "cards.json"
        try:
            write_private(path, json.dumps(cards_to_json(cards)))
        except OSError:
            log.exception("journal-unwritable", extra={"path": str(path)})

    def record(self, event: Event, now: float) -> None:
        """Append one event; after a failure nothing more is written. Kept: the current file and the one before."""
        if self._broken:
            return
        try:
            self._append(_without_secrets(event), now)
        except OSError:  # a full disk must not stop the models: the log is for people
            log.exception("journal-unwritable", extra={"path": str(self._folder)})
            self._broken = True

    def _append(self, event: Event, now: float) -> None:
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


def _without_secrets(event: Event) -> Event:
    """An engine's environment may hold tokens; decisions do not look at it."""
    if not isinstance(event, CatalogChanged):
        return event
    hidden = (model.model_copy(update={"env": dict.fromkeys(model.env, "***")}) for model in event.models)
    return CatalogChanged(tuple(hidden))
