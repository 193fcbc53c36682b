"""The list of models in OpenAI's form: one card for each name. Pure.

vLLM lists its own names so, and clients let users choose from the ids. ``root`` is the entry's own name, and so is the
``parent`` of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gateway_plugin.errors import ModelNotFound


def cards(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each entry under its ``id``, each of its ``aliases`` and each of its ``adapters``."""
    return [
        {**entry, "id": name, "root": entry["id"], "parent": parent}
        for entry in entries
        for name, parent in (
            *((name, None) for name in (entry["id"], *entry["aliases"])),
            *((name, entry["id"]) for name in entry.get("adapters", ())),
        )
    ]


def card(entries: Iterable[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The card of this name. Raises ``ModelNotFound``."""
    listed = cards(entries)
    for each in listed:
        if each["id"] == name:
            return each
    raise ModelNotFound(name, tuple(each["id"] for each in listed if each["id"] == each["root"]))
