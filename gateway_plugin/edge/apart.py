"""Requests of a model that is kept apart: through the ingress, and round it while it is away. Pure text.

Warm requests must not depend on Ray's head, so that the ingress is only the first choice here. Newcomers go round it
when its check fails; a request that it had when it went away is sent again, and finds the way round when the connection
is refused. There is no circle: round the ingress lies a slot, behind a slot without an engine the backend ``ingress``,
and that one has no way round.
"""

from __future__ import annotations

from pathlib import Path

from gateway_plugin.edge.answers import client_left, in_words
from gateway_plugin.errors import EngineBroke, Unavailable

CHECK = "/ready?check"
"""What the ingress is asked: Serve's proxy does not answer this for it, and without a controller it is of no use."""

AROUND = "x-gateway-around"
"""On a request that went round the ingress: an engine may have had it, though its model was kept apart."""

DISGUISE = {500: 550, 503: 553}
"""The ingress's statuses on their way to the edge, in the clear -> disguised. Serve's proxy has the clear ones for what
it says itself when a replica died or is not there: that may be tried again, and an engine's own answer never."""


def serve_says() -> str:
    """A backend's rules for what comes from Serve: its own words become JSON, the ingress's get their status back."""
    gone = EngineBroke("The gateway's ingress broke off before it had answered; it is being replaced. Try again.")
    away = Unavailable("Nothing can take this request now; the gateway is starting, or was stopped.", retry_after_s=5)
    returns = (
        f"  http-response return {in_words(gone)} if {{ status 500 }}",
        f"  http-response return {in_words(away)} if {{ status 503 }}",
    )
    clear = (f"  http-response set-status {status} if {{ status {told} }}" for status, told in DISGUISE.items())
    return "\n".join((*returns, *clear))


def around(door: Path, models_map: Path, ingress: str, secret: str) -> str:
    """The way of requests that are kept apart. ``ingress``: its server's line; a check of it is added.

    The check asks for the ingress itself, so that a proxy without one is passed by. A slow ingress is not a dead one,
    but nothing is lost round it: what is lost is only who was alone on an engine (``serve.ingress.trials``).
    """
    disguised = "\n".join(
        f"  http-after-response set-status {disguised} if {{ status {status} }}"
        for status, disguised in DISGUISE.items()
    )
    return f"""\
backend apart
{client_left()}
{serve_says()}
  retry-on conn-failure empty-response 500
  http-request set-header x-gateway-edge {secret}
  option httpchk
  http-check send meth GET uri {CHECK} hdr x-gateway-edge {secret}
  http-check expect status 200
  timeout check 4s
  {ingress} check inter 2s fastinter 1s downinter 1s fall 2 rise 1 observe layer4 error-limit 1 on-error mark-down
  server around unix@{door} backup no-check no-ssl

frontend around_door
  bind unix@{door} mode 600 proto h1
{disguised}
  http-request del-header x-gateway-edge
  http-request set-header {AROUND} 1
  http-request set-var(txn.slot) 'req.fhdr(x-gateway-model),map_str({models_map}),field(1,/)'
  use_backend %[var(txn.slot)] if {{ var(txn.slot) -m found }}
  default_backend ingress
"""
