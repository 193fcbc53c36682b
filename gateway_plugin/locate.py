"""Where the gateway is, and with which key: what the client, the apps and the CLI agree on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from urllib.parse import urlsplit

from gateway_plugin.errors import ConfigError, GatewayUnreachable, InvalidKey
from gateway_plugin.layout import Layout, default_state_root


def find_gateway(
    base_url: str | None = None, api_key: str | None = None, state: str | Path | None = None
) -> tuple[str, str]:
    """URL (without ``/v1``) and API key: of the arguments, else ``$GATEWAY_URL`` and ``$GATEWAY_API_KEY``, else of the
    gateway that runs from the state folder ``state`` (``$GATEWAY_STATE`` and so on; its admin key).

    A ``state`` that is given goes before the environment. The local admin key is taken for no URL but its own.

    Raises:
        GatewayUnreachable: no gateway is known here.
        InvalidKey: a URL is known, a key for it is not.
    """
    layout = Layout(Path(state).expanduser().absolute() if state is not None else default_state_root())
    local = _local_url(layout)
    url = base_url or (None if state is not None else os.environ.get("GATEWAY_URL")) or local
    if not url:
        raise GatewayUnreachable(
            f"No gateway is known: none was started from {layout.state}. Start one with 'gateway up', "
            "or set GATEWAY_URL and GATEWAY_API_KEY."
        )
    url = url.rstrip("/").removesuffix("/v1")
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ConfigError(f"The gateway's address must look like http://host:port, got {url!r} (GATEWAY_URL).")
    environment = os.environ.get("GATEWAY_API_KEY")
    own = _local_key(layout) if local is not None and url == local.rstrip("/") else None
    key = api_key or (own or environment if state is not None else environment or own)
    if not key:
        raise InvalidKey(f"There is no API key for {url}: set GATEWAY_API_KEY ('gateway keys create NAME' makes one).")
    return url, key


def _local_url(layout: Layout) -> str | None:
    try:
        document = json.loads(layout.service_json.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        raise ConfigError(f"{layout.service_json} is not valid JSON; remove it and run 'gateway up' again.") from None
    url = document.get("url") if isinstance(document, dict) else None
    return url if isinstance(url, str) else None


def _local_key(layout: Layout) -> str | None:
    try:
        return layout.admin_key.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def on_loopback(url: str) -> bool:
    """Whether ``url`` is on this machine, where no proxy has a part."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
