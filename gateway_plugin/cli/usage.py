"""``gateway usage``: what was asked of the gateway."""

from __future__ import annotations

import gzip
import io
import json
import re
import secrets
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import click

from gateway_plugin.catalog import Model, parse_catalog
from gateway_plugin.cli.connection import demand_at_hand
from gateway_plugin.cli.output import json_option, put, put_json, settings
from gateway_plugin.errors import ConfigError, GatewayError, NotFound
from gateway_plugin.files import write_private
from gateway_plugin.paths import Layout

_SECRET_BYTES = 32
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@click.group()
def usage() -> None:
    """The usage log: export-trace."""


@usage.command("export-trace")
@click.argument("logs", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="[LOG...]")
@click.option(
    "--since", metavar="WHEN", help="Only from then on: an age (7d, 12h, 30min), or a time (2026-11-01[T08:00])."
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Written there, packed if it ends in .gz. Default: stdout.")  # fmt: skip
@click.option("--names", is_flag=True, help="Keep the names of keys and callers; else each has a pseudonym.")
@click.option("--class", "classes", multiple=True, metavar="MODEL=CLASS",
              help="The simulator's class of a model (8b, vl, 32b, 70b, moe), by which it takes its size and times. "
              "Default: by its entry in the catalog.")  # fmt: skip
@json_option
def export_trace(
    logs: tuple[Path, ...], since: str | None, out: Path | None, names: bool, classes: tuple[str, ...]
) -> None:
    """Write the usage log as a trace for 'python -m serve.simulate'.

    LOG: files of the usage log; by default this gateway's, rotated ones too. Tokens are estimates from bytes.
    """
    from gateway_plugin import usage as log

    layout = Layout(settings().state)
    if not logs:
        demand_at_hand("The logs")
    found = log.read_log(logs or log.log_files(layout.usage_log), 0.0 if since is None else _when(since, time.time()))
    if not found.requests:
        raise NotFound(f"No request for a model is in {', '.join(map(str, logs)) or layout.usage_log}.")
    requests, of_class = log.classified(found.requests, _catalog(layout), dict(map(_chosen, classes)))
    named = str if names else log.pseudonym(_secret(layout))
    text = io.StringIO()
    count = log.write_trace(requests, named, text)
    _write(text.getvalue(), out)
    if found.unreadable:
        put(f"lines passed over as unreadable: {found.unreadable}", err=True)
    document = {"requests": count, "classes": of_class, "unreadable": found.unreadable, "out": out and str(out)}
    if out is not None and settings().json:
        put_json(document)
    elif out is not None:
        put(f"{count} requests to {out}; classes: {', '.join(f'{m} as {c}' for m, c in sorted(of_class.items()))}")


def _when(said: str, now: float) -> float:
    if (ago := re.fullmatch(r"(\d{1,6}(?:\.\d+)?) ?(s|min|h|d)", said)) is not None:
        return now - float(ago[1]) * _UNITS[ago[2]]
    try:
        return datetime.fromisoformat(said).timestamp()
    except ValueError:
        raise ConfigError(f"--since: expected 7d, 12h, 30min, or a date as 2026-11-01, got {said!r}") from None


def _chosen(said: str) -> tuple[str, str]:
    from gateway_plugin.usage import CLASSES

    model, equals, kind = said.rpartition("=")
    if not equals or not model or kind not in CLASSES:
        raise ConfigError(f"--class: expected MODEL=CLASS with one of {', '.join(CLASSES)}, got {said!r}")
    return model, kind


def _catalog(layout: Layout) -> Sequence[Model]:
    """That in force; none where it cannot be read: then names alone tell the classes."""
    try:
        return parse_catalog(json.loads(layout.catalog_json.read_bytes()), "catalog", in_force=True).models
    except (OSError, ValueError, GatewayError):
        return ()


def _secret(layout: Layout) -> bytes:
    """The key of the pseudonyms: made once, so that a user has the same one in every trace of this gateway."""
    try:
        said = layout.pseudonyms.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        made = secrets.token_bytes(_SECRET_BYTES)
        layout.pseudonyms.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(layout.pseudonyms, made.hex())
        return made
    except (OSError, ValueError) as error:
        raise ConfigError(f"{layout.pseudonyms}: cannot be read: {error}") from None
    if not re.fullmatch(f"[0-9a-f]{{{2 * _SECRET_BYTES}}}", said):  # with an empty one anybody could try names
        raise ConfigError(
            f"{layout.pseudonyms}: expected {2 * _SECRET_BYTES} hexadecimal digits: put it back from a copy, or "
            "move it away: users have other pseudonyms then"
        )
    return bytes.fromhex(said)


def _write(text: str, out: Path | None) -> None:
    if out is None:
        put(text.removesuffix("\n"))
        return
    data = text.encode()
    try:
        write_private(out, gzip.compress(data, mtime=0) if out.name.endswith(".gz") else data)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error}") from None
