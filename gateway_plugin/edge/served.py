"""Which requests go to engines: paths and names of models, as HAProxy's rules write them."""

from __future__ import annotations

from gateway_plugin.catalog import MODEL_NAME

FORMS = ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/images/edits")
"""They take a form (``multipart/form-data``). The edge does not parse one: without the header ``x-gateway-model`` the
ingress finds the model."""

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
    "/v1/audio/speech",
    "/v1/images/generations",
    *FORMS,
)
"""Paths that are passed to an engine, with POST; no others."""

# \z, not $: $ would let a name end in a newline, and so inject a header.
MODEL = rf"^{MODEL_NAME.pattern}\z"

PATHS = f"""\
  acl is_post method POST
  acl is_get method GET HEAD
  acl inference path {" ".join(INFERENCE)}"""
