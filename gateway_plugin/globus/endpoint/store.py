"""Records of endpoints: ``NAME.endpoint`` in the state folder's ``endpoints/``, changed under one lock."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway_plugin.errors import NotFound, ServiceError
from gateway_plugin.files import Garbled
from gateway_plugin.globus.endpoint import config_files as config
from gateway_plugin.paths import private_folder
from gateway_plugin.processes import Mark
from gateway_plugin.state_file import State, StateFile

_PATIENCE_S = 40.0
"""Longer than ``stop`` takes at worst: nothing else holds the lock for more than a moment."""


class Options(State):
    """Options of ``configure``; ``None``: not given. Kept, so that a second run changes only those it is given."""

    url: str | None = None
    key_file: str | None = None
    ca: Path | None = None
    input_folder: str | None = None
    workers: int | None = None
    heartbeat_s: float | None = None
    multi_user: bool | None = None
    identity_mapping: Path | None = None
    contact: str | None = None
    shared_folder: Path | None = None
    """Readable by all local users of a multi-user endpoint: for environment and site file."""
    venv: Path | None = None
    """An existing environment."""

    def over(self, kept: Options) -> Options:
        """These, completed by those of ``kept``."""
        return kept.model_copy(update=self.model_dump(exclude_none=True))


class EndpointRecord(State):
    """One endpoint as it was configured last, and the process that was started for it."""

    id: str
    """Given by Globus Compute."""
    venv: Path
    functions: tuple[str, ...]
    """Ids of the functions it may run, the one of this version last."""
    answers: str
    """Where answers are kept (``EndpointSettings.answers``)."""
    options: Options = Options()
    process: Mark | None = None
    host: str | None = None
    """Name of the machine that ``process`` was started on; its PID means nothing on another."""

    def elsewhere(self, here: str) -> str | None:
        """The other machine on which it was started and not stopped since, seen from the machine called ``here``."""
        return self.host if self.process is not None and self.host != here else None


class Records:
    """The records in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> tuple[str, ...]:
        """Those configured, sorted."""
        return tuple(sorted(path.stem for path in self._folder.glob("*.endpoint")))

    def find(self, name: str) -> EndpointRecord | None:
        """The one called ``name``, if it is configured. Raises ``ServiceError`` if its file is damaged."""
        try:
            return self._file(name).read()
        except (OSError, Garbled) as error:
            raise ServiceError(
                f"{error}. End the endpoint's process if it runs, remove the file, and run "
                f"'gateway endpoint configure {name}' with all of its options: its id stays the same."
            ) from None

    def known(self, name: str) -> EndpointRecord:
        """The one called ``name``. Raises ``NotFound``, ``ServiceError``."""
        found = self.find(name) if config.ENDPOINT_NAME.fullmatch(name) else None
        if found is None:
            raise NotFound(f"There is no endpoint '{name}' here; 'gateway endpoint configure' makes one.")
        return found

    def write(self, name: str, record: EndpointRecord) -> None:
        """Replace it, atomically; hold the lock from before it was read."""
        self._file(name).write(record)

    def remove(self, name: str) -> None:
        """Delete its record."""
        self._file(name).path.unlink(missing_ok=True)

    def _file(self, name: str) -> StateFile[EndpointRecord]:
        return StateFile(self._folder / f"{name}.endpoint", EndpointRecord)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One command changes records and processes at a time, also from another machine of a shared file system.

        Raises ``ServiceError`` if another command holds the lock for long.
        """
        private_folder(self._folder)
        deadline = time.monotonic() + _PATIENCE_S
        with os.fdopen(os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600), "w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise ServiceError(
                            f"Another 'gateway endpoint' command is at work in {self._folder}; wait for it."
                        ) from None
                    time.sleep(0.05)
            yield
