"""``gateway controller replay``: go through a recorded event log again and show what was decided."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from gateway_plugin.cli.output import json_option, settings
from gateway_plugin.errors import ConfigError


@click.group()
def controller() -> None:
    """The controller's decisions: replay."""


@controller.command()
@click.argument("log", type=click.Path(dir_okay=False, path_type=Path))
@json_option
def replay(log: Path) -> None:
    """Feed the events in LOG (controller/events.jsonl) to the core again; prints every event with its effects."""
    record: Any = importlib.import_module("serve.core.record")  # the client's package never imports the application
    for entry in record.replay(_documents(log)):
        if settings().json:
            click.echo(json.dumps(entry))
        else:
            effects = "; ".join(str(effect) for effect in entry["effects"]) or "-"
            click.echo(f"{entry['at']:.3f}  {entry['event']}  ->  {effects}")


def _documents(log: Path) -> Iterator[dict[str, Any]]:
    try:
        with log.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except ValueError:
                    raise ConfigError(f"{log}: line {number}: is not JSON") from None
    except OSError as error:
        raise ConfigError(f"{log}: cannot be read: {error.strerror}") from None
