"""Which requests go to engines: paths and names of models, as HAProxy's rules write them."""

from __future__ import annotations

from gateway_plugin.catalog import MODEL_NAME

INFERENCE = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/rerank",
    "/v2/rerank",
    "/rerank",
    "/v1/score",
    "/score",
    "/pooling",
    "/tokenize",
    "/detokenize",
)
"""Paths that are passed to an engine, with POST; no others."""

# \z, not $: $ would let a name end in a newline, and so inject a header.
MODEL = rf"^{MODEL_NAME.pattern}\z"

PATHS = f"""\
  acl is_post method POST
  acl is_get method GET HEAD
  acl inference path {" ".join(INFERENCE)}"""
