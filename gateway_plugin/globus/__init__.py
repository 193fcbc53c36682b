"""Models from anywhere, through Globus Compute: the function, the endpoint at the site, and the client.

    from gateway_plugin.globus import GlobusClient

The client's side (``client``, ``asyncio_client`` and what they import) needs ``globus-compute-sdk`` and nothing else:
``pip install 'gateway-plugin[globus]'``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateway_plugin.globus.client.asyncio_client import AsyncGlobusClient
    from gateway_plugin.globus.client.client import GlobusClient

__all__ = ["AsyncGlobusClient", "GlobusClient"]


def __getattr__(name: str) -> Any:
    # on first use: the endpoint's side imports this package without the SDK's client
    if name == "GlobusClient":
        from gateway_plugin.globus.client.client import GlobusClient

        return GlobusClient
    if name == "AsyncGlobusClient":
        from gateway_plugin.globus.client.asyncio_client import AsyncGlobusClient

        return AsyncGlobusClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
