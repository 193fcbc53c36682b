"""The inner door, through which the ingress sends requests back to the edge. Pure text."""

from __future__ import annotations

from pathlib import Path

from gateway_plugin.edge.frontends import HAS_SLOT, NOT_A_MODEL
from gateway_plugin.edge.hints import NO_PATH, plainer_words
from gateway_plugin.edge.places import Places
from gateway_plugin.edge.served import MODEL, PATHS


def inner_door(socket: Path, models_map: Path, places: Places) -> str:
    """The frontend for requests from the ingress, which name their model; stamped, so that they cannot loop."""
    one = "{ req.fhdr_cnt(x-gateway-model) eq 1 }"
    pattern = f"{{ req.fhdr(x-gateway-model) -m reg {MODEL} }}"
    return f"""\
frontend inner_door
  bind unix@{socket} mode 600 maxconn {places.inside} proto h1
{plainer_words()}\
{PATHS}
{NO_PATH.when("!is_post or !inference")}
{NOT_A_MODEL.when(f"!{one} or !{pattern}")}
  http-request del-header authorization
  http-request del-header x-api-key
  http-request set-header x-gateway-stamp 1
  http-request set-var(txn.person) req.fhdr(x-gateway-caller)
  # The ingress still has the request, and first finds out whether it killed the engine (serve.ingress.trials).
  http-request disable-l7-retry
  http-request wait-for-body time 30s
  http-request set-var(txn.slot) 'req.fhdr(x-gateway-model),map_str({models_map}),field(1,/)'
  use_backend %[var(txn.slot)] if {HAS_SLOT}
  default_backend ingress
"""
