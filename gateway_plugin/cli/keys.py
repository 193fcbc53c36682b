"""``gateway keys``: make, list and revoke API keys. Works on the state folder, whether the gateway runs or not; if it
runs, on its machine."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

import click

from gateway_plugin.cli.connection import demand_at_hand
from gateway_plugin.cli.output import json_option, put, say, settings, show, table
from gateway_plugin.errors import GatewayUnreachable
from gateway_plugin.paths import Layout

if TYPE_CHECKING:
    from gateway_plugin.edge.key import PriorityClass, Role


@click.group()
def keys() -> None:
    """API keys: create, list, revoke."""


@keys.command()
@click.argument("name")
@click.option("--role", type=click.Choice(("user", "endpoint", "admin")), default="user", show_default=True)
@click.option(
    "--priority",
    type=click.Choice(("interactive", "batch")),
    default="interactive",
    show_default=True,
    help="Of its requests while others wait too: 'batch' lets interactive ones go first.",
)
@json_option
def create(name: str, role: Role, priority: PriorityClass) -> None:
    """Make a key. Its secret is printed once and stored nowhere."""
    from gateway_plugin.edge.keys import KeyStore

    demand_at_hand("The keys")
    layout = Layout.of(settings().state)
    secret = KeyStore(layout).create(name, role, priority)
    works, usage = _how_to_use(layout)
    document = {"name": name, "role": role, "priority": priority, "secret": secret, "note": works or None}

    def human() -> None:
        put(f"{role} key '{name}'; it cannot be shown again:", err=True)
        put(secret)
        for line in (works, usage):
            if line:
                put(line, err=True)

    show(document, human)


def _how_to_use(layout: Layout) -> tuple[str, str]:
    """Where the key is not valid yet, and which settings a caller needs beside it."""
    from gateway_plugin.connection import PLAIN_HTTP, authority_of, known_url
    from gateway_plugin.service.discovery import edges_of

    try:
        url = known_url(layout)
    except GatewayUnreachable:
        return (
            f"No gateway was started from {layout.state} yet: the key works once 'gateway up' has, and nowhere else. "
            "For a gateway on another machine make a key there."
        ), ""
    down = "" if edges_of(layout) else f"The gateway at {url} does not run: the key works once it is up."
    if url.startswith("http:"):
        return down, f"Its user sets GATEWAY_API_KEY, GATEWAY_URL={url} and {PLAIN_HTTP}=1."
    ca = " and GATEWAY_CA, a file with what 'gateway ca' prints" if authority_of(layout, url) is not None else ""
    return down, f"Its user sets GATEWAY_API_KEY, GATEWAY_URL={url}{ca}."


@keys.command("list")
@json_option
def list_keys() -> None:
    """Names, roles, priorities and dates; no secrets."""
    from gateway_plugin.edge.keys import KeyStore

    demand_at_hand("The keys")
    layout = Layout.of(settings().state)
    found = KeyStore(layout).list()
    rows = [
        (
            key.name,
            key.role,
            key.priority,
            f"{datetime.datetime.fromtimestamp(key.created):%Y-%m-%d %H:%M}",
            "revoked, not confirmed by the edge" if key.revoked else "",
        )
        for key in found
    ]
    document = [key.model_dump(include={"name", "role", "priority", "created", "revoked"}) for key in found]
    none = f"no keys in {layout.state}"
    show(document, lambda: table(("key", "role", "priority", "created", ""), rows) if rows else put(none, err=True))


@keys.command()
@click.argument("name")
@json_option
def revoke(name: str) -> None:
    """Refuse a key from now on, and cut the requests that it has in flight.

    The command line's own, admin-cli, is replaced by a new one. Exit code 69 if the running edge did not confirm it.
    """
    from gateway_plugin.edge.keys import CLI_KEY_NAME, KeyStore

    demand_at_hand("The keys")
    KeyStore(Layout.of(settings().state)).revoke(name)
    replaced = name == CLI_KEY_NAME
    words = f"'{name}' is revoked" + ("; a new one lies in admin.key of the state folder" if replaced else "")
    show({"name": name, "revoked": True, "replaced": replaced}, lambda: say(words))
