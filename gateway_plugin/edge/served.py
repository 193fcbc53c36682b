"""Which requests go to engines: paths and names of models, as HAProxy's rules write them."""

from __future__ import annotations

from gateway_plugin.catalog import MODEL_NAME
from gateway_plugin.passing import INFERENCE

# \z, not $: $ would let a name end in a newline, and so inject a header.
MODEL = rf"^{MODEL_NAME.pattern}\z"

PATHS = f"""\
  acl is_post method POST
  acl is_get method GET HEAD
  acl inference path {" ".join(INFERENCE)}"""
