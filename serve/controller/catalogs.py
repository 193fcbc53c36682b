"""The initial catalog of a controller."""

from __future__ import annotations

import json
import logging

from gateway_plugin.catalog import Catalog, parse_catalog
from gateway_plugin.errors import ConfigError
from gateway_plugin.files import set_aside
from gateway_plugin.paths import Layout

log = logging.getLogger("gateway.controller")


def catalog_in_force(layout: Layout) -> Catalog:
    """``catalog.json``; a garbled one is set aside, and the catalog as ``up`` read it from the user's file is used,
    without later changes by ``models apply``.

    Raises ``ConfigError``, ``OSError`` or ``ValueError`` where that cannot be read either.
    """
    path = layout.catalog_json
    try:
        return parse_catalog(json.loads(path.read_bytes()), str(path), in_force=True)
    except (OSError, ValueError, ConfigError) as error:
        copy = layout.catalog_of_file
        found = parse_catalog(json.loads(copy.read_bytes()), str(copy), in_force=True)
        said = str(error)
    if path.exists():
        log.error("state-garbled", extra={"path": str(path), "error": said, "set_aside": str(set_aside(path))})
    return found
