"""``gateway controller replay``: process a recorded event log again and show the decisions."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from gateway_plugin.cli.output import json_option, put, put_json, settings
from gateway_plugin.errors import ConfigError


@click.group()
def controller() -> None:
    """The controller's decisions: replay."""


@controller.command()
@click.argument("logs", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="LOG...")
@json_option
def replay(logs: tuple[Path, ...]) -> None:
    """Feed the events in LOG (controller/events.jsonl) to the core again; prints every event with its effects and
    decisions. Several: the older one first. Stops where they are not those of the controller that wrote the log."""
    # By name: this package never imports the application's (docs/design.md, import rules).
    record: Any = importlib.import_module("serve.core.replay")
    for number, one in enumerate(record.replay(_lines(logs)), 1):
        if settings().json:
            put_json(
                {
                    "at": one.at,
                    **record.event_to_json(one.event),
                    "effects": [{"effect": type(effect).__name__, **asdict(effect)} for effect in one.effects],
                    "decisions": [{**asdict(made), "action": made.action.value} for made in one.decisions],
                    "as_recorded": one.as_recorded,
                }
            )
        else:
            decided = [f"    decided: {_said(made)}" for made in one.decisions]
            put("\n".join([str(one.event), *(f"    {effect}" for effect in one.effects), *decided]))
        if not one.as_recorded:
            raise ConfigError(
                f"{', '.join(map(str, logs))}: event {number} ({type(one.event).__name__} at {one.at}): this version "
                "does otherwise than the controller that recorded it: replay the log with that version"
            )


def _said(made: Any) -> str:
    engine = f" ({made.engine})" if made.engine else ""
    other = f", for {made.other}" if made.other else ""
    return f"{made.action.value} {made.model}{engine}{other}: {made.because}"


def _lines(logs: tuple[Path, ...]) -> Iterator[str]:
    for log in logs:
        try:
            with log.open(encoding="utf-8") as lines:
                yield from lines
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{log}: cannot be read: {error}") from None
