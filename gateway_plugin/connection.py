"""Address, key and server verification of a gateway, common to the client, the apps and the CLI.

A key is sent only to a program that has proved to be the gateway. On a shared machine any user may listen on a port
that is free for a moment, so neither an address nor a file that reports a running gateway is proof. There are two
proofs: a Unix socket in a folder that only the gateway's own user can write to, and a certificate signed by a trusted
authority.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from gateway_plugin.errors import ConfigError, GatewayUnreachable, InvalidKey
from gateway_plugin.files import Garbled, with_copy
from gateway_plugin.ownership import problem_with
from gateway_plugin.paths import Layout, default_state_root

PLAIN_HTTP = "GATEWAY_PLAIN_HTTP"
"""Environment variable: ``1`` lets a key go over plain HTTP."""

_UNKNOWN = (
    "No gateway is known: none was started from {state}. Start one with 'gateway up', "
    "or set GATEWAY_URL and GATEWAY_API_KEY."
)


class Connection(NamedTuple):
    """How to reach one gateway."""

    url: str
    """Without ``/v1``; for display."""
    key: str
    ca: Path | None = None
    """Certificates of the authority that signed the gateway's certificate; ``None``: the system's."""
    door: Path | None = None
    """Unix socket of the gateway's own user, instead of ``url``."""

    def verify(self) -> ssl.SSLContext | bool:
        """The argument ``verify`` of ``httpx``. Raises ``ConfigError`` if the file of certificates cannot be used."""
        if self.ca is None or self.door is not None:
            return True
        try:
            return ssl.create_default_context(cafile=str(self.ca))
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{self.ca}: no certificates can be read from it ({error}); see GATEWAY_CA.") from None


def find_gateway(
    base_url: str | None = None,
    api_key: str | None = None,
    state: str | Path | None = None,
    *,
    ca: str | Path | None = None,
    plain_http: bool | None = None,
) -> Connection:
    """The gateway of the arguments, else of ``$GATEWAY_URL``, ``$GATEWAY_API_KEY`` and ``$GATEWAY_CA``, else the one
    that runs from the state folder ``state`` (``$GATEWAY_STATE`` and so on; its admin key).

    An explicit ``state`` takes precedence over the environment. The local admin key is used for no URL but its own.
    Without ``ca`` and ``$GATEWAY_CA`` a gateway elsewhere is verified with ``$SSL_CERT_FILE``, else with the system's.
    ``plain_http`` (``$GATEWAY_PLAIN_HTTP`` if ``None``): the user accepts a gateway that cannot prove its identity.

    Raises:
        GatewayUnreachable: no gateway is known here, or the known one cannot be reached from this machine.
        InvalidKey: a URL is known, a key for it is not.
        ConfigError: the URL is invalid, or is plain HTTP without permission.
        ServiceError: the state folder, or one above it, is another user's or can be changed by one.
    """
    environment: Mapping[str, str] = {} if state is not None else os.environ
    place = (Path(state) if state is not None else default_state_root()).expanduser().absolute()
    elsewhere = base_url or environment.get("GATEWAY_URL")
    needed = state is not None or not (elsewhere and (api_key or os.environ.get("GATEWAY_API_KEY")))
    # With URL and key given the state folder is not needed: an untrusted one is then not read.
    layout = Layout.of(place) if needed else Layout(place)
    record = _record(layout) if needed or problem_with(place) is None else None
    local = str(record["url"]).rstrip("/") if record is not None else None
    url = elsewhere or local
    if not url:
        raise GatewayUnreachable(_UNKNOWN.format(state=layout.state))
    url = url.rstrip("/").removesuffix("/v1")
    scheme = urlsplit(url).scheme
    if scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ConfigError(f"The gateway's address must look like https://host:port, got {url!r} (GATEWAY_URL).")
    own = _local_key(layout) if local is not None and url == local else None
    given = os.environ.get("GATEWAY_API_KEY")
    key = api_key or (own or given if state is not None else given or own)
    if not key:
        at_hand = local is not None and url == local and layout.admin_key.exists()
        garbled = (
            f", and {layout.admin_key} is garbled: 'gateway keys revoke admin-cli' makes it anew" if at_hand else ""
        )
        raise InvalidKey(
            f"There is no API key for {url}{garbled}: set GATEWAY_API_KEY ('gateway keys create NAME' makes one)."
        )
    own_authority = _authority(layout, record) if url == local else None
    authority = ca or environment.get("GATEWAY_CA") or own_authority or os.environ.get("GATEWAY_CA")
    authority = authority or os.environ.get("SSL_CERT_FILE")
    found = Connection(url, key, Path(authority).expanduser().absolute() if authority is not None else None)
    if record is not None and not elsewhere:
        return _own_gateway(layout, str(record.get("host") or socket.gethostname()), found)
    demand_proof(url, plain_http)
    return found


def demand_proof(url: str, plain_http: bool | None = None) -> None:
    """Refuse an address whose server cannot prove its identity, unless the user permits it.

    Raises ``ConfigError``. ``plain_http``: as for ``find_gateway``.
    """
    if urlsplit(url).scheme == "http" and not (os.environ.get(PLAIN_HTTP) == "1" if plain_http is None else plain_http):
        raise ConfigError(
            f"{url} is plain HTTP: the key would go to any program that listens there, and nothing shows that it is "
            f"the gateway. Use its https:// address with GATEWAY_CA (the file that 'gateway ca' prints); or, where "
            f"the site serves plain HTTP and the machine is your own, set {PLAIN_HTTP}=1 or plain_http=True."
        )


def known_url(layout: Layout) -> str:
    """The address of a state folder's gateway, running or not. Raises ``GatewayUnreachable``."""
    record = _record(layout)
    if record is None:
        raise GatewayUnreachable(_UNKNOWN.format(state=layout.state))
    return str(record["url"]).rstrip("/")


def _own_gateway(layout: Layout, host: str, found: Connection) -> Connection:
    """Connection to this user's own gateway: by the socket on its own machine, by verified TLS from another."""
    if host == socket.gethostname():
        return found._replace(door=_owner_door(layout, found.url))
    if on_loopback(found.url):
        raise GatewayUnreachable(
            f"The gateway of {layout.state} runs on {host} and listens on that machine's loopback only ({found.url}): "
            "run this there, or give the site another 'bind'. No key was sent to this machine's loopback."
        )
    return found


def _owner_door(layout: Layout, url: str) -> Path:
    """The socket, in a folder that no other user can write to. Raises ``GatewayUnreachable``."""
    door = layout.owner_door
    problem = problem_with(door.parent)
    if problem is not None:
        raise GatewayUnreachable(f"The gateway cannot be reached: {problem}. No key was sent.")
    try:
        found = door.lstat()
    except OSError:
        raise GatewayUnreachable(
            f"The gateway at {url} does not run, or this process has another /tmp or GATEWAY_RUN_ROOT than it: {door} "
            f"is not there. 'gateway up' starts it; from inside a container set GATEWAY_URL={url}.",
            retry_after_s=5.0,
        ) from None
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.getuid():
        raise GatewayUnreachable(f"{door} is not a socket of this user. No key was sent.")
    return door


def authority_of(layout: Layout, url: str) -> Path | None:
    """The gateway's own authority, if it signed the certificate of the state folder's gateway, at ``url``."""
    record = _record(layout)
    return _authority(layout, record) if record is not None and str(record["url"]).rstrip("/") == url else None


def _authority(layout: Layout, record: Mapping[str, Any] | None) -> Path | None:
    """The gateway's own authority, if that signed the front door's certificate."""
    return layout.ca if record is not None and record.get("own_certificate") is True else None


def _record(layout: Layout) -> Mapping[str, Any] | None:
    try:
        document = with_copy(layout.service_json, layout.supervisor_status, "service") or {}
    except OSError:
        return None
    except Garbled as error:
        raise ConfigError(f"{error}; 'gateway up', or 'down' and 'up', puts it right.") from None
    return document if isinstance(document.get("url"), str) else None


def _local_key(layout: Layout) -> str | None:
    """The admin key; ``None`` also if the file's content is not a valid header."""
    try:
        key = layout.admin_key.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return key if key.isprintable() else None


def on_loopback(url: str) -> bool:
    """Whether ``url`` is on this machine, where no proxy is involved."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
