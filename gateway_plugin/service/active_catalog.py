"""The catalog of an ``up`` without ``--models``: the last ``up``'s file, or the catalog that ``models apply`` made
since."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from gateway_plugin.catalog import Catalog, catalog_document, parse_catalog
from gateway_plugin.errors import ConfigError
from gateway_plugin.ownership import others_write
from gateway_plugin.paths import Layout, write_private
from gateway_plugin.site import Site
from gateway_plugin.sizing.catalog_file import read_catalog


@dataclass(frozen=True)
class Chosen:
    """A catalog and its source."""

    file: Path
    """The user's file, also if the catalog is not read from it."""
    catalog: Catalog
    from_file: bool
    note: str = ""
    """A message for the user if the file differs; empty otherwise."""


def choose(layout: Layout, file: Path, lives: bool, site: Site | None = None) -> Chosen:
    """The catalog of an ``up`` without ``--models``; ``file`` is the last one's.

    (1) The gateway is down and its catalog is the file as last read: the file is read again. (2) A live gateway keeps
    the catalog in force. (3) So does the next one if ``models apply`` changed it. If the file differs, (2) and (3) add
    a note.

    Raises:
        ConfigError: the catalog to be read is invalid.
    """
    present = _read(layout.catalog_json)
    if present is None or (not lives and present == _read(layout.catalog_of_file)):  # (1)
        return Chosen(file, read_catalog(file, site), from_file=True)
    try:
        differs = read_catalog(file, site) != present
    except ConfigError:
        differs = True
    if not differs:
        return Chosen(file, present, from_file=True)
    if lives:  # (2)
        note = f"{file} is not what is in force: 'gateway models apply {file}' changes that."
    else:  # (3)
        note = (
            f"the catalog that 'gateway models apply' put in force is kept; {file} differs: "
            f"'gateway models apply {file}' takes it, or 'up --models {file}' the next time."
        )
    return Chosen(file, present, from_file=False, note=note)


def own_catalog() -> Path:
    """``models.yaml`` of the working folder, which was not named: it may be another user's, and an entry may start any
    program.

    Raises ``ConfigError``.
    """
    file = Path("models.yaml")
    if not file.exists():
        raise ConfigError(f"there is no {file.absolute()}: name a catalog with --models FILE (docs/catalog.md).")
    if file.stat().st_uid not in (0, os.getuid()) or others_write(file.stat()):
        raise ConfigError(f"{file.absolute()} is, or may be, another user's: if you trust it, say so: --models {file}.")
    return file


def in_force(layout: Layout) -> Catalog | None:
    """The application's current or last catalog; ``None`` if there is none that can be read."""
    return _read(layout.catalog_json)


def remember(layout: Layout, chosen: Chosen) -> None:
    """Record the file's content, so that the next ``up`` detects whether ``models apply`` changed the catalog."""
    if chosen.from_file:
        write_private(layout.catalog_of_file, json.dumps(catalog_document(chosen.catalog), indent=1))


def _read(path: Path) -> Catalog | None:
    try:
        return parse_catalog(json.loads(path.read_text(encoding="utf-8")), str(path), in_force=True)
    except (OSError, ValueError, ConfigError):
        return None
