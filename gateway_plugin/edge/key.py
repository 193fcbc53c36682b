"""One API key without its secret, as the store and the edge's map have it. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Role = Literal["user", "endpoint", "admin"]
"""``endpoint``: a user whose word for whom it asks (``x-gateway-caller``) goes into the usage log."""

KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
"""What a key may be called: it goes into headers, maps and the usage log."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_CREATED_MAX = 2.5e11
"""Seconds since 1970: within the years that a date can have."""


@dataclass(frozen=True)
class Key:
    """One key without its secret."""

    name: str
    role: Role
    sha256: str
    """Hexadecimal, lower case."""
    created: float
    """Seconds since 1970."""
    revoked: bool = False
    """No edge that starts lets it in; that the running one does not either is not confirmed yet."""


def map_digest(key: Key) -> str:
    """As the edge's ``sha2(256),hex`` prints it."""
    return key.sha256.upper()


def _value(key: Key) -> str:
    return f"{key.role}:{key.name}"


def admitted(keys: tuple[Key, ...]) -> dict[str, str]:
    """What the edge's map holds."""
    return {map_digest(key): _value(key) for key in keys if not key.revoked}


def _entry(key: Key) -> dict[str, Any]:
    return {name: value for name, value in asdict(key).items() if name != "revoked" or value}


def store_text(keys: tuple[Key, ...]) -> str:
    """``keys.json``."""
    return json.dumps({"keys": [_entry(key) for key in keys]}, indent=1) + "\n"


def key_of(entry: Mapping[str, Any]) -> Key:
    """As the store has it; what a later version wrote is passed over. Raises ``TypeError`` or ``ValueError``."""
    known = {field.name for field in fields(Key)}
    key = Key(**{name: value for name, value in entry.items() if name in known})
    if not KEY_NAME.fullmatch(key.name) or key.role not in get_args(Role) or not _DIGEST.fullmatch(key.sha256):
        raise ValueError(f"{key.name!r}: expected a key's name, its role, and its SHA-256")
    if isinstance(key.created, bool) or not 0 <= key.created < _CREATED_MAX:
        raise ValueError(f"{key.name!r}: expected seconds since 1970, got {key.created!r}")
    return key


def from_map(digest: str, value: str, created: float) -> Key:
    """As the map has it. Raises ``ValueError``."""
    role, _, name = value.partition(":")
    return key_of({"name": name, "role": role, "sha256": digest.lower(), "created": created})
