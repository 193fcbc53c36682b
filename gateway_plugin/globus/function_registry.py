"""Functions that an endpoint may run: each version's id at Globus Compute, and the SHA-256 of its text."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from gateway_plugin.errors import ServiceError
from gateway_plugin.files import Garbled
from gateway_plugin.paths import private_folder
from gateway_plugin.state_file import State, StateFile

ENTRY_POINT = "infer"
_SOURCE = Path(__file__).with_name("function.py")
_VERSION = re.compile(r'^FUNCTION_VERSION = "([0-9]+\.[0-9]+\.[0-9]+)"$', re.MULTILINE)


class Function(State):
    """One registered version."""

    version: str
    sha256: str
    id: str
    """Given by Globus Compute."""


class Registry(State):
    """The file of functions, oldest first."""

    entry_point: str = ENTRY_POINT
    functions: tuple[Function, ...]


def source() -> str:
    """The registered text: that of ``function.py``."""
    return _SOURCE.read_text(encoding="utf-8")


def version_of(text: str) -> str:
    """The version in a function's text. Raises ``ServiceError`` if there is none."""
    found = _VERSION.search(text)
    if found is None:
        raise ServiceError(f"{_SOURCE} has no FUNCTION_VERSION; install the package again.")
    return found[1]


def digest_of(text: str) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def registered(functions: tuple[Function, ...], text: str) -> Function | None:
    """The entry for exactly this text, if it was registered before."""
    digest = digest_of(text)
    return next((function for function in functions if function.sha256 == digest), None)


def read(path: Path) -> tuple[Function, ...]:
    """The registered functions, oldest first. Raises ``ServiceError`` if the file is garbled."""
    try:
        found = StateFile(path, Registry).read()
    except Garbled as error:
        raise ServiceError(f"{error}; remove it and run 'gateway endpoint configure'.") from None
    return () if found is None else found.functions


def write(path: Path, functions: tuple[Function, ...]) -> None:
    """Replace the manifest, atomically."""
    private_folder(path.parent)
    StateFile(path, Registry).write(Registry(functions=functions))
