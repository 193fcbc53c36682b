"""Files that are written atomically, 0600, and kept when a disk is full or they are garbled. Without pydantic, so that
a block's script starts without it: until its signal handlers are there, a signal ends it unhandled.

What is in force counts, and its copy on disk follows: a copy that cannot be written is tried again until it is there.
A garbled file is set aside under a new name, never removed: it may be all there is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gateway_plugin.ownership import problem_with

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Numbers of errors that say that a disk or a quota is full."""


def write_private(path: Path, content: str | bytes) -> None:
    """Write a 0600 file atomically: a reader sees the old content or the new one, and other users see neither.

    Raises ``OSError``, which names ``path``; the old content is there then.
    """
    with beside(path, content) as fresh:
        os.replace(fresh, path)


@contextlib.contextmanager
def beside(path: Path, content: str | bytes) -> Iterator[str]:
    """The name of a file with ``content``, on disk and in the folder of ``path``: for the caller to rename."""
    data = content.encode() if isinstance(content, str) else content
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            yield name
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def text_in(path: Path) -> str | None:
    """The text in ``path``, as far as it is UTF-8; ``None`` if there is no such file. Raises ``OSError``."""
    try:
        return path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return None


class Garbled(ValueError):
    """A file is there and is not what it should be."""


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in ``path``; ``None`` if there is no such file.

    Raises:
        Garbled: it is empty, cut off, no JSON or no object; says how.
        OSError: it cannot be read.
    """
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:  # neither JSON nor UTF-8, or nested without end
        raise Garbled(f"{path} is garbled ({error})") from None
    if not isinstance(document, dict):
        raise Garbled(f"{path} is garbled (expected a JSON object)")
    return document


def with_copy(path: Path, copy: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in ``path``; where that is garbled or missing, what the object in ``copy`` has under ``name``.

    ``None`` if ``path`` is missing and there is no such copy (or it may be another's). Raises ``Garbled`` if neither
    can be understood.
    """
    try:
        if (found := read_object(path)) is not None:
            return found
        garbled = None
    except Garbled as error:
        garbled = error
    if problem_with(copy.parent) is None:
        with contextlib.suppress(OSError, Garbled):
            kept = (read_object(copy) or {}).get(name)
            if isinstance(kept, dict):
                return kept
    if garbled is not None:
        raise garbled
    return None


def set_aside(path: Path) -> Path:
    """Give ``path`` a name that is not read: ``NAME.garbled``, or ``NAME.garbled.2`` and so on. Needs no room on disk.

    Raises ``OSError``.
    """
    number, aside = 1, path.with_name(f"{path.name}.garbled")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.garbled.{number}")
    path.rename(aside)
    return aside


def why_unwritten(error: OSError) -> str:
    """Why something cannot be written and what to do, for everybody: no path is in it."""
    said = error.strerror or str(error)
    advice = "make room there" if error.errno in NO_ROOM else "look at its disk and its mode"
    return f"the gateway's state folder cannot be written ({said}); an administrator must {advice}"


class Copies:
    """Copies on disk of what is in force. One that cannot be written is kept here and tried again. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._late: dict[Path, str] = {}
        self._failed: dict[Path, OSError] = {}

    def keep(self, path: Path, content: str) -> None:
        """Have ``content`` in ``path``: now if that can be, else as soon as it can. Blocks as long as the disk does."""
        with self._lock:
            self._late[path] = content
            self._write(path)

    def retry(self) -> None:
        """Write what could not be written until now."""
        with self._lock:
            for path in tuple(self._late):
                self._write(path)

    def failed(self, path: Path, error: OSError) -> None:
        """``path``, which is kept elsewhere, could not be written."""
        self._failed[path] = error

    def written(self, path: Path) -> None:
        """It could again."""
        self._failed.pop(path, None)

    @property
    def trouble(self) -> str:
        """Why something is not on disk, for everybody; empty if all is."""
        error = next(iter(tuple(self._failed.values())), None)
        return "" if error is None else why_unwritten(error)

    @property
    def unwritten(self) -> tuple[str, ...]:
        """The files that are not on disk as they should be, for administrators."""
        return tuple(sorted(str(path) for path in tuple(self._failed)))

    def _write(self, path: Path) -> None:
        try:
            write_private(path, self._late[path])
        except OSError as error:
            self._failed[path] = error
        else:
            del self._late[path]
            self._failed.pop(path, None)
