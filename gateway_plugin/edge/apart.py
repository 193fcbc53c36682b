"""Requests of a model that is kept apart: through the ingress, and round it while it is away. Pure text.

Warm requests must not depend on Ray's head, so that the ingress is only the first choice here. Newcomers go round it
when its check fails; a request that it had when it went away is sent again, and finds the way round when the connection
is refused. There is no circle: round the ingress lies a slot, behind a slot without an engine the backend ``ingress``,
and that one has no way round.
"""

from __future__ import annotations

from pathlib import Path

from gateway_plugin.edge.error_pages import client_left

CHECK = "/check"
"""What the ingress is asked: without a controller it is of no use."""

AROUND = "x-gateway-around"
"""On a request that went round the ingress: an engine may have had it, though its model was kept apart."""


def around(door: Path, bind: str, models_map: Path, ingress_socket: Path, secret: str, counted: str) -> str:
    """The way of requests that are kept apart. ``bind``: the around door's line; ``counted``: rules that bound them.

    A slow ingress is not a dead one, but nothing is lost round it: what is lost is only who was alone on an engine
    (``serve.ingress.trials``).
    """
    return f"""\
backend apart
{client_left()}
{counted}\
  http-request del-header authorization
  http-request del-header x-api-key
  http-request set-header x-gateway-edge {secret}
  option httpchk
  http-check send meth GET uri {CHECK} hdr x-gateway-edge {secret}
  http-check expect status 200
  timeout check 4s
  default-server inter 2s fastinter 1s downinter 1s fall 2 rise 1 observe layer4 error-limit 1 on-error mark-down
  server ingress unix@{ingress_socket} check
  server around unix@{door} backup no-check no-ssl

frontend around_door
  bind {bind}
  http-request del-header x-gateway-edge
  http-request set-header {AROUND} 1
  http-request set-var(txn.slot) 'req.fhdr(x-gateway-model),map_str({models_map}),field(1,/)'
  use_backend %[var(txn.slot)] if {{ var(txn.slot) -m found }}
  default_backend ingress
"""
