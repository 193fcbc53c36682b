"""Requests of a model kept apart: through the ingress, and around it while it is down. Pure text.

Warm requests must not depend on Ray's head, so the ingress is only the first choice here. New requests bypass it when
its health check fails; a request that it was handling is retried, and takes the bypass when the connection is refused.
There is no loop: the bypass leads to a slot, a slot without an engine leads to the backend ``ingress``, and that
backend has no bypass.
"""

from __future__ import annotations

from pathlib import Path

from gateway_plugin.edge.error_pages import client_left
from gateway_plugin.passing import AROUND, FOUND_MODEL

CHECK = "/check"
"""Health check of the ingress: it fails without a controller."""


def around(door: Path, bind: str, models_map: Path, ingress_socket: Path, secret: str, counted: str) -> str:
    """Route of requests kept apart. ``bind``: line of the around door; ``counted``: rules that limit them.

    A slow ingress may be taken for a dead one. No request is lost then, only the record of which request was alone on
    an engine (``serve.ingress.trials``).
    """
    return f"""\
backend apart
{client_left()}
{counted}\
  http-request del-header authorization
  http-request del-header x-api-key
  http-request set-header x-gateway-edge {secret}
  http-response del-header {FOUND_MODEL}
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
  http-request set-var(txn.person) req.fhdr(x-gateway-caller)
  http-request set-var(txn.slot) 'req.fhdr(x-gateway-model),map_str({models_map}),field(1,/)'
  use_backend %[var(txn.slot)] if {{ var(txn.slot) -m found }}
  default_backend ingress
"""
