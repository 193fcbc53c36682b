"""``gateway controller replay``: go through a recorded event log again and show what was decided."""

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
@click.option("--site", help="Site that the log is of. Default: the one that runs, or local.")
@json_option
def replay(log: Path, site: str | None) -> None:
    """Feed the events in LOG (controller/events.jsonl) to the core again; prints every event with its effects."""
    from gateway_plugin.layout import Layout
    from gateway_plugin.service.record import read_record
    from gateway_plugin.site import load_site

    known = read_record(Layout.of(settings().state))
    chosen = load_site(site or (known.site_reference if known is not None else "local"))
    # By name: this package never imports the application's (docs/design.md, who may import whom).
    policy: Any = importlib.import_module("serve.app").policy(chosen)
    record: Any = importlib.import_module("serve.core.record")
    try:
        with log.open(encoding="utf-8") as lines:
            for event, effects in record.replay(policy, lines):
                if settings().json:
                    document = {**record.event_to_json(event), "effects": [_document(effect) for effect in effects]}
                    put_json(document)
                else:
                    put("\n".join([str(event), *(f"    {effect}" for effect in effects)]))
    except OSError as error:
        raise ConfigError(f"{log}: cannot be read: {error.strerror}") from None


def _document(effect: Any) -> dict[str, Any]:
    return {"effect": type(effect).__name__, **asdict(effect)}
