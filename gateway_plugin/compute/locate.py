"""Which endpoint and which function: arguments, else the environment, else this version's manifest."""

from __future__ import annotations

import os

from gateway_plugin.errors import ConfigError


def find_endpoint(endpoint_id: str | None = None, function_id: str | None = None) -> tuple[str, str]:
    """Endpoint and function. Raises ``ConfigError`` naming the one that is not known."""
    endpoint = endpoint_id or os.environ.get("GATEWAY_ENDPOINT")
    if not endpoint:
        raise ConfigError(
            "No endpoint is known: give its id ('gateway endpoint status' shows it), or set GATEWAY_ENDPOINT."
        )
    function = function_id or os.environ.get("GATEWAY_FUNCTION")
    if not function:
        raise ConfigError(
            "No function is known: give its id ('gateway endpoint status' shows it), or set GATEWAY_FUNCTION."
        )
    return endpoint, function
