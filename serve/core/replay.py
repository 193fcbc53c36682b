"""Events as JSON and back, so that a recorded log can be replayed: the same events give the same decisions.

A line of a log is ``{"at": now, "event": TYPE, ...fields}``. The first is ``{"at": now, "version": VERSION, "fleet":
{...}}``: the fleet that the first event met, so that a log can begin anywhere in a controller's life.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from gateway_plugin.errors import ConfigError
from serve.core.effects import Effect
from serve.core.events import Event
from serve.core.state import Fleet
from serve.core.step import step

VERSION = 3
"""Version of a recorded fleet. Another version cannot be replayed: its fields may have another meaning."""
_TYPES: dict[str, type] = {kind.__name__: kind for kind in get_args(Event)}


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def event_to_json(event: Event) -> dict[str, Any]:
    """``{"event": TYPE, ...fields}``, ready for ``json.dumps``."""
    kind: type = type(event)
    return {"event": kind.__name__, **_adapter(kind).dump_python(event, mode="json")}


def event_from_json(document: Mapping[str, Any]) -> Event:
    """The event that ``event_to_json`` wrote. Raises ``ConfigError`` for anything else."""
    kind = _TYPES.get(document.get("event", ""))
    if kind is None:
        raise ConfigError(f"recorded event: event: expected one of {', '.join(_TYPES)}, got {document.get('event')!r}")
    known = {field.name for field in fields(kind)} | {"at", "event"}
    if unknown := sorted(document.keys() - known):
        raise ConfigError(f"recorded event: {kind.__name__}: {unknown[0]}: unknown key")
    made: Event = _read(kind, document, f"recorded event: {kind.__name__}")
    return made


def fleet_to_json(fleet: Fleet) -> dict[str, Any]:
    """``{"version": VERSION, "fleet": ...}``: all of a fleet, its policy too, ready for ``json.dumps``."""
    return {"version": VERSION, "fleet": _adapter(Fleet).dump_python(fleet, mode="json")}


def fleet_from_json(document: Mapping[str, Any]) -> Fleet:
    """The fleet that ``fleet_to_json`` wrote. Raises ``ConfigError`` for anything else."""
    if document.get("version") != VERSION:
        raise ConfigError(
            f"recorded fleet: another version of the gateway wrote it (format {document.get('version', 1)}, this one "
            f"reads {VERSION}): replay the log with that version"
        )
    made: Fleet = _read(Fleet, document.get("fleet"), "recorded fleet")
    return made


def _read(kind: type, document: object, what: str) -> Any:
    try:
        return _adapter(kind).validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{what}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def replay(lines: Iterable[str]) -> Iterator[tuple[Event, tuple[Effect, ...]]]:
    """Every event of a log, with its effects.

    Raises ``ConfigError`` for a log that is empty, does not begin with a fleet, or ends within a line.
    """
    fleet: Fleet | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
            now = float(document["at"])
        except (ValueError, TypeError, KeyError):
            cut = "" if line.endswith("\n") else "; the log is cut off here"
            raise ConfigError(f"event log: line {number}: expected a JSON object with 'at' and 'event'{cut}") from None
        if "fleet" in document:
            fleet = fleet_from_json(document)
            continue
        event = event_from_json(document)
        if fleet is None:
            raise ConfigError(
                f"event log: line {number}: an event before any 'fleet': the log's beginning is missing, or an earlier "
                "version wrote it; it cannot be replayed"
            )
        fleet, effects = step(fleet, event, now)
        yield event, effects
    if fleet is None:
        raise ConfigError("event log: it is empty")
