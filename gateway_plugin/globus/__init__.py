"""Models from anywhere, through Globus Compute: the function, the endpoint at the site, and the client's side.

    from gateway_plugin.globus import GlobusClient

``pip install 'gateway-plugin[globus]'``; the SDK is imported when a client of an endpoint is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateway_plugin.globus.client.client import AsyncGlobusClient, GlobusClient

__all__ = ["AsyncGlobusClient", "GlobusClient"]


def __getattr__(name: str) -> Any:
    # on first use: the endpoint's side imports this package without an HTTP stack
    if name in __all__:
        from gateway_plugin.globus.client import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
