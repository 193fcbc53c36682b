"""Events as JSON and back, so that a recorded log can be replayed: the same events give the same decisions.

A line of a log is ``{"at": now, "event": TYPE, ...fields, "did": DIGEST}``, without ``did`` where the event had neither
effect nor decision. The first is ``{"at": now, "version": VERSION, "digests": true, "fleet": {...}}``: the fleet that
the first event met, so that a log can begin anywhere in a controller's life. Effects and decisions are not in it: they
follow from the events, and the digest shows whether they are the same again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from functools import cache
from itertools import takewhile
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from gateway_plugin.catalog import Model
from gateway_plugin.errors import ConfigError
from serve.core.effects import Effect
from serve.core.events import Event
from serve.core.state import Decision, Fleet
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
    kind = _TYPES.get(str(document.get("event", "")))
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


@dataclass(frozen=True)
class Replayed:
    """One event of a log, and what the core does at it now."""

    at: float
    event: Event
    effects: tuple[Effect, ...]
    decisions: tuple[Decision, ...]
    fleet: Fleet
    """After it."""
    as_recorded: bool = True
    """The effects and decisions are those of the controller that wrote the log, by their digest."""


def new_decisions(before: Fleet, after: Fleet) -> tuple[Decision, ...]:
    """The decisions of the step from ``before`` to ``after``."""
    if after.decisions is before.decisions:
        return ()
    last = before.decisions[-1] if before.decisions else None
    made = tuple(takewhile(lambda decision: decision is not last, reversed(after.decisions)))
    return made[::-1]


def digest(effects: Sequence[Effect], decisions: Sequence[Decision]) -> str:
    """A short hash of what a step did: equal in any process for equal effects and decisions, in the same order.

    Of a model only its name counts: a log does not have the values of its environment.
    """
    if not effects and not decisions:
        return ""
    text = repr([_canonical(one) for one in (*effects, *decisions)])
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=6).hexdigest()


def _canonical(value: Any) -> Any:
    """``value`` in a form whose ``repr`` does not depend on the process: no order of sets, no addresses of objects."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is tuple or kind is list:
        return [_canonical(one) for one in value]
    if isinstance(value, Mapping):
        return sorted((key, _canonical(one)) for key, one in value.items())
    if kind is frozenset:
        return sorted(value)
    if isinstance(value, Model):
        return value.name
    if isinstance(value, Enum):
        return value.value
    return kind.__name__, [_canonical(one) for one in vars(value).values()]  # an effect, a decision, an error


_PLAIN = frozenset({str, int, float, bool, type(None)})


def replay(lines: Iterable[str]) -> Iterator[Replayed]:
    """Every event of a log, or of several in a row, with its effects and decisions.

    Raises ``ConfigError`` for a log that is empty, does not begin with a fleet, or ends within a line.
    """
    fleet: Fleet | None = None
    digested = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
            now = float(document["at"])
        except (ValueError, TypeError, KeyError, RecursionError):
            cut = "" if line.endswith("\n") else "; the log is cut off here"
            raise ConfigError(f"event log: line {number}: expected a JSON object with 'at' and 'event'{cut}") from None
        if "fleet" in document:
            fleet = fleet_from_json(document)
            digested = bool(document.get("digests"))
            continue
        recorded = document.pop("did", "")
        event = event_from_json(document)
        if fleet is None:
            raise ConfigError(
                f"event log: line {number}: an event before any 'fleet': the log's beginning is missing, or an earlier "
                "version wrote it; it cannot be replayed"
            )
        before = fleet
        fleet, effects = step(before, event, now)
        decisions = new_decisions(before, fleet)
        same = not digested or digest(effects, decisions) == recorded
        yield Replayed(now, event, effects, decisions, fleet, same)
    if fleet is None:
        raise ConfigError("event log: it is empty")
