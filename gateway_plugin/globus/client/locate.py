"""Which endpoint and which function: arguments, else the environment, else what was registered from this machine."""

from __future__ import annotations

import os

from gateway_plugin.errors import ConfigError
from gateway_plugin.globus import function_registry as manifest
from gateway_plugin.ownership import problem_with
from gateway_plugin.paths import default_state_root


def find_endpoint(endpoint_id: str | None = None, function_id: str | None = None) -> tuple[str, str]:
    """Endpoint and function. Raises ``ConfigError`` naming the one that is not known."""
    endpoint = endpoint_id or os.environ.get("GATEWAY_ENDPOINT")
    if not endpoint:
        raise ConfigError(
            "No endpoint is known: give its id ('gateway endpoint status' shows it), or set GATEWAY_ENDPOINT."
        )
    function = function_id or os.environ.get("GATEWAY_FUNCTION") or _registered_here()
    if not function:
        raise ConfigError(
            "No function is known: give its id ('gateway endpoint status' shows it), or set GATEWAY_FUNCTION."
        )
    return endpoint, function


def _registered_here() -> str | None:
    """The id of this version's function, on a machine whose state folder has a manifest of it."""
    state = default_state_root()
    if problem_with(state) is not None:
        return None  # it may be another user's, who would choose the function
    known = manifest.read(state / "endpoints" / "functions.json")
    found = manifest.registered(known, manifest.source())
    return found.id if found else None
