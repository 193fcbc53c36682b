"""Files of the controller: its epoch, the administrator's pins, and its events for ``controller replay``.

All other state is reported again by the agents and the edge. No failure here stops a controller: a failed write is kept
and retried, an unreadable file is set aside and begun anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, TypeVar

from gateway_plugin.catalog import Model
from gateway_plugin.files import Copies, Garbled, read_object, set_aside
from gateway_plugin.paths import ControllerFiles
from gateway_plugin.state_file import State, StateFile, state_text
from serve.controller.learned import KeptLearned
from serve.core.events import CatalogChanged, Event
from serve.core.replay import event_to_json, fleet_to_json
from serve.core.state import Fleet
from serve.core.views.cards import Cards, cards_from_json, cards_to_json

log = logging.getLogger("gateway.controller")

_LOG_BYTES_MAX = 20_000_000
_LOG_RETRY_S = 5.0

Read = TypeVar("Read")


class Pins(State):
    """``wishes.json``: an administrator's changes to the catalog's pins."""

    pinned: frozenset[str] = frozenset()
    unpinned: frozenset[str] = frozenset()


class Journal:
    """Files in the controller's folder. Small, synchronous, on the state folder's disk."""

    def __init__(self, folder: Path, copies: Copies | None = None) -> None:
        self._files = ControllerFiles(folder)
        self._copies = copies or Copies()
        self._log: IO[str] | None = None
        self._written = 0
        self._secret = secrets.token_bytes(16)
        self._retry_at: float | None = None
        """Time of the next try after a failure."""

    def next_epoch(self, now: float) -> int:
        """Higher than any before: one more than the last controller's, and not less than ``now``, seconds since 1970,
        so that it rises even if the file could not be read or written."""
        path = self._files.epoch
        last = self._read(path, lambda: int(path.read_text()) if path.exists() else 0, 0)
        epoch = max(last + 1, int(now))
        self._copies.keep(path, str(epoch))
        return epoch

    def pins(self) -> tuple[frozenset[str], frozenset[str]]:
        """Models that an administrator pinned, and models of the catalog's pins that one unpinned."""
        file = StateFile(self._files.pins, Pins)
        kept = self._read(file.path, lambda: file.read() or Pins(), Pins())
        return kept.pinned, kept.unpinned

    def keep_pins(self, pinned: frozenset[str], unpinned: frozenset[str]) -> None:
        """Keep them for the next controller."""
        self._copies.keep(self._files.pins, state_text(Pins(pinned=pinned, unpinned=unpinned)))

    def cards(self) -> Cards:
        """Model cards of the last controller; none if the file cannot be read."""
        path = self._files.cards
        return self._read(path, lambda: cards_from_json(read_object(path) or {}), {})

    def keep_cards(self, cards: Cards) -> None:
        """Keep them for the next controller."""
        self._copies.keep(self._files.cards, json.dumps(cards_to_json(cards)))

    def learned(self) -> KeptLearned:
        """What the last controller had learned; nothing if the file cannot be read."""
        file = StateFile(self._files.learned, KeptLearned)
        return self._read(file.path, lambda: file.read() or KeptLearned(), KeptLearned())

    def keep_learned(self, found: KeptLearned) -> None:
        """Keep it for the next controller."""
        self._copies.keep(self._files.learned, state_text(found))

    def record(self, event: Event, now: float, before: Fleet, did: str = "", *, news: bool = True) -> None:
        """Append one event, received in the state ``before``; ``did``: ``serve.core.replay.digest`` of its step. An
        event without ``news`` changes nothing, so a replay does not need it: it is written only as a due retry after a
        failure, which shows whether there is room again.

        Every file begins with the fleet at that time, so that it can be replayed by itself. After a failure the next
        try begins a new file. Kept: the current file and the one before.
        """
        if (not news) if self._retry_at is None else now < self._retry_at:
            return
        path = self._files.events
        try:
            if self._log is None or self._written > _LOG_BYTES_MAX:
                self._log = self._open(path, now, before)
            line = {"at": now, **event_to_json(self._without_secrets(event)), **({"did": did} if did else {})}
            self._written += self._append(self._log, line)
        except OSError as error:  # a full disk must not stop the models
            if self._log is not None and not self._written:  # no event is in it, and the next try would put it in the
                with contextlib.suppress(OSError):  # place of the log before
                    path.unlink(missing_ok=True)
            self._retry_at, self._log = now + _LOG_RETRY_S, None
            self._copies.failed(path, error)
        else:
            self._retry_at = None
            self._copies.written(path)

    def _open(self, path: Path, now: float, fleet: Fleet) -> IO[str]:
        if self._log is not None:
            _close(self._log)
        if path.exists() and path.stat().st_size > 0:
            path.replace(self._files.events_before)
        path.touch(mode=0o600)
        self._log, self._written = path.open("a", encoding="utf-8"), 0
        models = {name: self._shown(model) for name, model in fleet.models.items()}
        self._append(self._log, {"at": now, "digests": True, **fleet_to_json(replace(fleet, models=models))})
        return self._log

    @staticmethod
    def _append(opened: IO[str], document: dict[str, object]) -> int:
        """Raises ``OSError``; then the file ends with half a line, and is closed."""
        line = json.dumps(document, separators=(",", ":")) + "\n"
        try:
            opened.write(line)
            opened.flush()
        except OSError:
            _close(opened)
            raise
        return len(line)

    def _shown(self, model: Model) -> Model:
        """Hide the values of an engine's environment, which may be tokens. Equal ones stay equal and others different
        (a keyed hash, with a key that is nowhere kept), since a changed value makes the controller load again."""
        runtime = model.runtime
        if runtime is not None:
            runtime = runtime.model_copy(update={"env": self._hidden(runtime.env)})
        return model.model_copy(update={"env": self._hidden(model.env), "runtime": runtime})

    def _hidden(self, env: Mapping[str, str]) -> dict[str, str]:
        return {
            name: hashlib.blake2b(value.encode(errors="surrogatepass"), digest_size=6, key=self._secret).hexdigest()
            for name, value in env.items()
        }

    def _without_secrets(self, event: Event) -> Event:
        if not isinstance(event, CatalogChanged):
            return event
        return CatalogChanged(tuple(self._shown(model) for model in event.models), event.adapted)

    def _read(self, path: Path, read: Callable[[], Read], default: Read) -> Read:
        """The result of ``read`` for ``path``; ``default`` for a malformed file, which is set aside."""
        try:
            return read()
        except OSError:
            log.exception("state-unreadable", extra={"path": str(path)})
            return default
        except (Garbled, ValueError, TypeError, KeyError, AttributeError) as error:
            said = str(error)
        try:
            log.error("state-garbled", extra={"path": str(path), "error": said, "set_aside": str(set_aside(path))})
        except OSError:
            log.exception("state-garbled", extra={"path": str(path)})
        return default


def _close(opened: IO[str]) -> None:
    with contextlib.suppress(OSError):  # nor can the rest of its buffer be written
        opened.close()
