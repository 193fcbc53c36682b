"""Which requests engines are asked: paths, and names of models, as HAProxy's rules have them."""

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
"""What goes through to an engine, with POST: these paths and no other."""

# \z, not $: that would let a name end in a newline, and a header with it.
MODEL = rf"^{MODEL_NAME.pattern}\z"

PATHS = f"""\
  acl is_post method POST
  acl is_get method GET HEAD
  acl inference path {" ".join(INFERENCE)}"""
