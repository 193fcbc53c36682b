"""Values of an engine's environment that must not be shown with its output: pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_SECRET_NAME = re.compile(
    r"(?<!tik)token(?!izer)|key|secret|passw|passphrase|pass(_|$)|credential|auth|cookie|jwt|connection_string|dsn(_|$)",
    re.IGNORECASE,
)
_LENGTH_MIN = 12
"""Shorter values are settings (``1``, ``spawn``, ``bfloat16``), which occur in any text."""
_LENGTH_MIN_NAMED = 6
"""For a variable with a secret's name. Shorter: ``1`` and ``false`` of ``HF_HUB_DISABLE_..._TOKEN``."""


def speaks_of_a_secret(name: str) -> bool:
    """Whether a variable is a secret by its name: ``HF_TOKEN``, not ``TIKTOKEN_ENCODINGS_BASE``."""
    return _SECRET_NAME.search(name) is not None


def secrets_of(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The values for ``masked`` to hide; of one with several lines, each line."""
    found = set()
    for name, value in environment.items():
        named = speaks_of_a_secret(name)
        if not named and value.startswith(("/", "~", ".")):
            continue  # a path, such as HF_HOME: errors about it must be readable
        least = _LENGTH_MIN_NAMED if named else _LENGTH_MIN
        found |= {part.strip() for part in (value, *value.splitlines()) if len(part.strip()) >= least}
    return tuple(sorted(found))


def masked(text: str, secrets: Iterable[str]) -> str:
    """``text`` with ``***`` for each secret, the longest first: one may be part of another."""
    for secret in sorted((secret for secret in secrets if secret), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text
