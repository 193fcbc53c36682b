"""``gateway ca``: the certificate by which callers verify the front door."""

from __future__ import annotations

import click

from gateway_plugin.cli.connection import demand_at_hand
from gateway_plugin.cli.output import json_option, put, settings, show
from gateway_plugin.connection import authority_of, known_url
from gateway_plugin.errors import GatewayUnreachable, NotFound
from gateway_plugin.paths import Layout


@click.command()
@click.option("--path", is_flag=True, help="Print the file's path instead, for programs of this user on this machine.")
@json_option
def ca(path: bool) -> None:
    """Print the certificate that callers verify the gateway with.

    It is that of the gateway's own authority, in PEM.

    \b
    Give it to users in a file, with their key:
      gateway ca > /shared/gateway-ca.pem
      export GATEWAY_CA=/shared/gateway-ca.pem                Client, apps, gateway chat ...
      SSL_CERT_FILE=/shared/gateway-ca.pem python program.py  openai and most others
    """
    demand_at_hand("The certificates")
    layout = Layout.of(settings().state)
    try:
        text = layout.ca.read_text(encoding="ascii")
    except FileNotFoundError:
        raise NotFound(f"There is no {layout.ca} yet: 'gateway up' makes it.") from None
    try:
        url = known_url(layout)
    except GatewayUnreachable:
        url = ""
    if url and authority_of(layout, url) is None:
        put(f"{url} has no certificate of this authority: the site gives another one, or plain_http.", err=True)
    words = str(layout.ca) if path else text.rstrip("\n")
    show({"path": str(layout.ca), "pem": text}, lambda: put(words))
