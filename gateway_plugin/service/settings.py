"""``service.json`` as a document, for whoever needs a value of it: the Serve application, the client, the CLI."""

from __future__ import annotations

import json
from typing import Any

from gateway_plugin.errors import ConfigError
from gateway_plugin.layout import Layout


def read_service(layout: Layout) -> dict[str, Any]:
    """The document in ``service.json`` (docs/design.md, Seams). Raises ``ConfigError`` if there is none."""
    try:
        document = json.loads(layout.service_json.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{layout.service_json}: no such file; 'gateway up' writes it") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{layout.service_json}: cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{layout.service_json}: expected a JSON object")
    return document
