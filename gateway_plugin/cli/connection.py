"""Which gateway a command addresses: that of ``--state``, else that of ``GATEWAY_URL``, else the local one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gateway_plugin.cli.output import put, settings
from gateway_plugin.errors import ConfigError

if TYPE_CHECKING:
    from gateway_plugin.client import Client


@contextmanager
def connect(endpoint: str | None = None) -> Iterator[Client]:
    """A client, closed at the end; of a Globus Compute endpoint, if one is given."""
    from gateway_plugin.client import Client

    chosen = settings()
    place = {"state": chosen.state if chosen.explicit_state else None} if endpoint is None else {"endpoint": endpoint}
    with Client(**place) as client:
        yield client


def elsewhere() -> str | None:
    """The address in ``GATEWAY_URL``, if a command addresses it and it is not that of the state folder's gateway.

    Raises ``ConfigError`` if the state folder's record is damaged.
    """
    from gateway_plugin.connection import known_url
    from gateway_plugin.errors import GatewayUnreachable
    from gateway_plugin.paths import Layout

    chosen = settings()
    url = os.environ.get("GATEWAY_URL", "").rstrip("/").removesuffix("/v1")
    if not url or chosen.explicit_state:
        return None
    try:
        return None if known_url(Layout(chosen.state)) == url else url
    except GatewayUnreachable:
        return url


def demand_at_hand(what: str) -> None:
    """Refuse a command on files of the gateway's machine while ``GATEWAY_URL`` names another gateway.

    Raises ``ConfigError``.
    """
    url = elsewhere()
    if url is not None:
        raise ConfigError(
            f"{what} of {url} (GATEWAY_URL) are on that gateway's own machine: run this there. For the gateway of "
            f"{settings().state} unset GATEWAY_URL, or say it: gateway --state {settings().state} ..."
        )


def mind_elsewhere() -> None:
    """Print which gateway other commands address, if not the one that was just started or ended here."""
    url = elsewhere()
    if url is not None:
        put(f"GATEWAY_URL is {url}: chat, models, blocks and status ask that gateway, not this one", err=True)
