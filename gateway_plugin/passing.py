"""Paths and headers by which edge and ingress pass requests on."""

from __future__ import annotations

FORMS = ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/images/edits")
"""They take a form (``multipart/form-data``), because they take files; all others take JSON. The edge does not parse
one: without the header ``x-gateway-model`` the ingress finds the model."""

INFERENCE = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages",
    "/v1/messages/count_tokens", "/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/pooling",
    "/tokenize", "/detokenize", "/v1/audio/speech", "/v1/images/generations", *FORMS,
)  # fmt: skip
"""Paths that are passed to an engine, with POST; no others."""

AROUND = "x-gateway-around"
"""On a request that the edge sent past an ingress that was away, and that may have reached an engine although its model
is kept apart (``gateway_plugin.edge.apart``)."""
FOUND_MODEL = "x-gateway-found-model"
"""On an answer of the ingress: the request's model, for the edge's usage log."""
NOT_ROUTED = "x-gateway-not-routed"
"""On an ingress's answer to a request that came in through the inner door and found no engine, and on the edge's own
where an engine closed the connection before its answer."""
PRIORITY = "x-gateway-priority"
"""Of a request: ``batch``, or not there; the edge sets it itself, by key and request."""
