"""``gateway controller replay``: process a recorded event log again and show the decisions."""

from __future__ import annotations

import importlib
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
@click.argument("log", type=click.Path(dir_okay=False, path_type=Path))
@json_option
def replay(log: Path) -> None:
    """Feed the events in LOG (controller/events.jsonl) to the core again; prints every event with its effects."""
    # By name: this package never imports the application's (docs/design.md, import rules).
    record: Any = importlib.import_module("serve.core.replay")
    try:
        with log.open(encoding="utf-8") as lines:
            for event, effects in record.replay(lines):
                if settings().json:
                    document = {**record.event_to_json(event), "effects": [_document(effect) for effect in effects]}
                    put_json(document)
                else:
                    put("\n".join([str(event), *(f"    {effect}" for effect in effects)]))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{log}: cannot be read: {error}") from None


def _document(effect: Any) -> dict[str, Any]:
    return {"effect": type(effect).__name__, **asdict(effect)}
