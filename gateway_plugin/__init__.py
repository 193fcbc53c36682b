"""Gateway Plugin: language-model serving on batch clusters.

This package is what a user imports (``Client``, the Parsl apps, the CLI) and what an administrator configures
(catalog, site, service, edge, blocks). It imports neither Ray nor vLLM unless a part that needs them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateway_plugin.asyncio_client import AsyncClient
    from gateway_plugin.client import Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    # on first use: an agent or a block script that needs one small module should not import an HTTP stack
    if name == "Client":
        from gateway_plugin.client import Client

        return Client
    if name == "AsyncClient":
        from gateway_plugin.asyncio_client import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
