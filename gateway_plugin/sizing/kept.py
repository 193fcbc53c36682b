"""What the hub said of a model's size, kept on disk, so that a catalog can be read again without the hub.

One file in the cache folder, 0600. A commit does not change: what is kept of it is not asked again. Of a branch, a tag
or no revision the hub is asked again after a day, and what is kept is used if it cannot be reached.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError

from gateway_plugin.errors import ServiceError
from gateway_plugin.files import write_private
from gateway_plugin.hub import cache_folder
from gateway_plugin.hub_cache import lacks, snapshot
from gateway_plugin.ownership import others_write
from gateway_plugin.paths import cache_root
from gateway_plugin.sizing.plan import Source
from gateway_plugin.sizing.source import read_source
from gateway_plugin.weights import is_local, split_revision

_MOST = 256
"""Models kept; the oldest go."""
_BYTES_MAX = 4 << 20
_FRESH_S = 86_400.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


class _Entry(BaseModel):
    """What was said of one model, and when: seconds since the epoch."""

    at: float
    source: Source


class _File(BaseModel):
    format: Literal[1] = 1
    """Another one is not used: raise it where ``parse_config`` counts otherwise, or what is kept has other fields."""
    sources: dict[str, _Entry]


class Kept:
    """The file. ``weights_folder``: the site's."""

    def __init__(
        self, path: Path | None = None, now: Callable[[], float] = time.time, weights_folder: Path | None = None
    ) -> None:
        self._places = dict.fromkeys((cache_folder(weights_folder), cache_folder()))
        self._path = path or cache_root() / "sizes.json"
        self._now = now
        self._lock = threading.Lock()

    def source(self, name: str, ask: Callable[[str], Source] = read_source) -> Source:
        """The sizes of the model at ``name``, as ``read_source`` has them, and raises:

        (1) of a folder as it is now; (2) as kept, if that is a commit's or fresh; (3) of a snapshot of that commit in
        the site's ``weights_folder`` or the hub's own cache; (4) as the hub says; (5) as kept, or of a snapshot, if
        the hub cannot be reached.
        """
        if is_local(name):  # (1)
            return ask(name)
        commit = _COMMIT.fullmatch(split_revision(name)[1]) is not None
        kept = self._all().get(name)
        if kept is not None and (commit or 0 <= self._now() - kept.at < _FRESH_S):  # (2)
            return kept.source
        if commit and (found := _snapshot(name, ask, self._places)) is not None:  # (3)
            return found
        try:
            found = ask(name)  # (4)
        except ServiceError:
            known = kept.source if kept is not None else _snapshot(name, ask, self._places)  # (5)
            if known is None:
                raise
            return known
        self._keep(name, found)
        return found

    def _all(self) -> dict[str, _Entry]:
        """What is kept, by name; of a file that cannot be used nothing."""
        try:
            seen = self._path.stat()
            if seen.st_uid != os.getuid() or others_write(seen) or seen.st_size > _BYTES_MAX:
                return {}
            return _File.model_validate_json(self._path.read_bytes()).sources
        except (OSError, ValidationError):
            return {}

    def _keep(self, name: str, found: Source) -> None:
        """On a full disk it is asked again the next time; so is a model whose licence is no UTF-8 (``"\\ud800"``)."""
        with self._lock, contextlib.suppress(OSError, PydanticSerializationError):
            known = {**self._all(), name: _Entry(at=self._now(), source=found)}
            latest = sorted(known.items(), key=lambda item: (-item[1].at, item[0]))[:_MOST]
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            write_private(self._path, _File(sources=dict(latest)).model_dump_json())


def _snapshot(name: str, ask: Callable[[str], Source], places: Iterable[Path]) -> Source | None:
    """The sizes of a model whose files lie in one of these caches, preferably whole; ``None``: they do not."""
    repository, revision = split_revision(name)
    found: list[Path] = []
    for place in places:
        with contextlib.suppress(OSError):
            folder = snapshot(place, repository, revision)
            if folder is not None and (folder / "config.json").is_file():
                found.insert(0 if not lacks(folder) else len(found), folder)
    return replace(ask(str(found[0])), name=repository, revision=found[0].name) if found else None
