"""The initial catalog of a controller."""

from __future__ import annotations

import json
import logging

from gateway_plugin.catalog import Catalog, parse_catalog
from gateway_plugin.errors import ConfigError
from gateway_plugin.files import set_aside
from gateway_plugin.paths import Layout
from serve.core.events import CatalogChanged, EngineGrew, EngineReady, Event
from serve.core.state import Fleet
from serve.core.views.cards import Cards, raised

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


def with_more_memory(before: Fleet, event: Event, cards: Cards) -> CatalogChanged | None:
    """The catalog after ``event`` with the memory that engines were seen to hold, where that was worked out and is too
    little; ``None`` if it is enough. It is not written to ``catalog.json``, which stays comparable with the user's
    file: the cards are kept, and the next controller raises it again."""
    if isinstance(event, CatalogChanged):
        models = event.models
    elif isinstance(event, EngineReady | EngineGrew):
        models = tuple(before.models.values())
    else:
        return None
    more = raised(models, cards, before.policy.node_types)
    for model, was in zip(more, models, strict=True):
        if model is not was:
            words = {"model": was.name, "predicted_gib": was.memory_gib, "memory_gib": model.memory_gib}
            log.warning("memory-raised", extra={**words, "measured_mib": cards[was.name].used_mib})
    return CatalogChanged(more) if more != models else None
