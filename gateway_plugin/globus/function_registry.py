"""Which functions an endpoint may run: each version's id at Globus Compute, and the SHA-256 of its text."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from gateway_plugin.errors import ServiceError
from gateway_plugin.paths import private_folder, write_private

ENTRY_POINT = "infer"
_SOURCE = Path(__file__).with_name("function.py")
_VERSION = re.compile(r'^FUNCTION_VERSION = "([0-9]+\.[0-9]+\.[0-9]+)"$', re.MULTILINE)


@dataclass(frozen=True)
class Function:
    """One registered version."""

    version: str
    sha256: str
    id: str
    """Given by Globus Compute."""


def source() -> str:
    """The text that is registered: that of ``function.py``."""
    return _SOURCE.read_text(encoding="utf-8")


def version_of(text: str) -> str:
    """The version that a text says it is. Raises ``ServiceError`` if it says none."""
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
    """What was registered, oldest first. Raises ``ServiceError`` if the file is damaged."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["functions"]
        return tuple(Function(**entry) for entry in entries)
    except FileNotFoundError:
        return ()
    except (ValueError, TypeError, KeyError) as error:
        raise ServiceError(f"{path} is damaged ({error}); remove it and run 'gateway endpoint configure'.") from error


def write(path: Path, functions: tuple[Function, ...]) -> None:
    """Replace the manifest, atomically."""
    private_folder(path.parent)
    document = {"entry_point": ENTRY_POINT, "functions": [asdict(function) for function in functions]}
    write_private(path, json.dumps(document, indent=1) + "\n")
