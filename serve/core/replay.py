"""Events as JSON and back, so that a recorded log can be replayed: the same events give the same decisions.

A line of a log is ``{"at": now, "event": TYPE, ...fields}``. The first is ``{"at": now, "fleet": {...}}``: the fleet
that the first event met, so that a log can begin anywhere in a controller's life.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import json
import types
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from gateway_plugin.catalog import Model
from gateway_plugin.errors import ConfigError
from serve.core import events, policy, state
from serve.core.effects import Effect
from serve.core.events import Event
from serve.core.state import Fleet
from serve.core.step import step

_TYPES: dict[str, type] = {kind.__name__: kind for kind in get_args(Event)}


def event_to_json(event: Event) -> dict[str, Any]:
    """``{"event": TYPE, ...fields}``, ready for ``json.dumps``."""
    fields = {field.name: _plain(getattr(event, field.name)) for field in dataclasses.fields(event)}
    return {"event": type(event).__name__, **fields}


def event_from_json(document: Mapping[str, Any]) -> Event:
    """The event that ``event_to_json`` wrote. Raises ``ConfigError`` where it is no such thing."""
    kind = _TYPES.get(document.get("event", ""))
    if kind is None:
        raise ConfigError(f"recorded event: event: expected one of {', '.join(_TYPES)}, got {document.get('event')!r}")
    try:
        made: Event = _read(kind, {key: value for key, value in document.items() if key not in ("event", "at")})
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"recorded event: {kind.__name__}: {error}") from None
    return made


def fleet_to_json(fleet: Fleet) -> dict[str, Any]:
    """All of a fleet, its policy too, ready for ``json.dumps``."""
    document: dict[str, Any] = _plain(fleet)
    return document


def fleet_from_json(document: object) -> Fleet:
    """The fleet that ``fleet_to_json`` wrote. Raises ``ConfigError`` where it is no such thing."""
    try:
        made: Fleet = _read(Fleet, document)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"recorded fleet: {error}") from None
    return made


def replay(lines: Iterable[str]) -> Iterator[tuple[Event, tuple[Effect, ...]]]:
    """Every event of a log, with what was decided on it.

    Raises ``ConfigError`` where it is empty, does not begin with a fleet, or ends within a line: it is not whole.
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
            fleet = fleet_from_json(document["fleet"])
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


def _plain(value: Any) -> Any:
    if isinstance(value, Model):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _read(kind: Any, value: Any) -> Any:
    """``value`` as read from JSON, as a ``kind``: the annotation of a field of an event or of the fleet."""
    origin = get_origin(kind)
    if kind is Model:
        return Model.model_validate(value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = _hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise ValueError(f"{unknown[0]}: unknown key")
        return kind(**{key: _read(hints[key], item) for key, item in value.items()})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if origin is tuple and get_args(kind)[-1] is not Ellipsis:
        return tuple(_read(one, item) for one, item in zip(get_args(kind), value, strict=True))
    if origin is tuple:
        return tuple(_read(get_args(kind)[0], item) for item in value)
    if origin is frozenset:
        return frozenset(value)
    if origin is collections.abc.Mapping:
        return {key: _read(get_args(kind)[1], item) for key, item in value.items()}
    if origin is types.UnionType:
        return None if value is None else _read(next(a for a in get_args(kind) if a is not type(None)), value)
    if kind is float:
        return float(value)
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, {**vars(policy), **vars(state), **vars(events)})
