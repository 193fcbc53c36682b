"""One API key without its secret, as stored and as in the edge's map. Pure."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from gateway_plugin.state_file import State

Role = Literal["user", "endpoint", "admin"]
"""``endpoint``: its header ``x-gateway-caller``, on whose behalf it asks, is trusted for the usage log."""

PriorityClass = Literal["interactive", "batch"]
"""Of a key's requests while they wait for a model or its engines; a request may lower its own."""

KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
"""Allowed names of a key: they go into headers, maps and the usage log."""

_CREATED_MAX = 2.5e11
"""Seconds since 1970, within the range of a date."""


class Key(State):
    """One key without its secret."""

    # In pydantic's regular expressions ``$`` is the end of the text, not the place before a last newline.
    name: Annotated[str, StringConstraints(pattern=f"^{KEY_NAME.pattern}$")]
    role: Role
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    """Hexadecimal, lower case."""
    created: Annotated[float, Field(ge=0, lt=_CREATED_MAX, strict=True)]
    """Seconds since 1970."""
    priority: PriorityClass = "interactive"
    revoked: bool = False
    """An edge that starts does not admit it; the running edge has not confirmed yet that it does not."""


BATCH = ":batch"
"""End of a batch key's value in the edge's map. No name has a colon."""


def map_digest(key: Key) -> str:
    """As the edge's ``sha2(256),hex`` prints it."""
    return key.sha256.upper()


def _value(key: Key) -> str:
    return f"{key.role}:{key.name}" + (BATCH if key.priority == "batch" else "")


def admitted(keys: tuple[Key, ...]) -> dict[str, str]:
    """The value in the edge's map."""
    return {map_digest(key): _value(key) for key in keys if not key.revoked}


class Keys(State):
    """``keys.json``."""

    keys: tuple[Key, ...]


def from_map(digest: str, value: str, created: float) -> Key:
    """Parse a value of the map. Raises ``ValueError``."""
    role, _, name = value.removesuffix(BATCH).partition(":")
    priority = "batch" if value.endswith(BATCH) else "interactive"
    return Key.model_validate(
        {"name": name, "role": role, "sha256": digest.lower(), "created": created, "priority": priority}
    )
