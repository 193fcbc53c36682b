"""Values of vLLM's options in a catalog entry's ``args``. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)([kmgtKMGT]?)")
_UNITS = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
}  # fmt: skip
"""As vLLM reads them."""


def value_of(words: Sequence[str], *options: str) -> str | None:
    """The value of the last of these options (without dashes in front, such as ``max-model-len``): vLLM takes the later
    of two. ``None``: it is not given."""
    for place in reversed(range(len(words))):
        option, given, value = words[place].partition("=")
        if option.startswith("-") and option.lstrip("-").replace("_", "-") in options:
            return value if given else next(iter(words[place + 1 : place + 2]), "")
    return None


def number_of(text: str | None) -> int | None:
    """A positive number as vLLM reads it (``32768``, ``32k``, ``0.5G``); ``None`` for anything else."""
    found = _NUMBER.fullmatch(text or "")
    return None if found is None else int(float(found[1]) * _UNITS[found[2]]) or None
