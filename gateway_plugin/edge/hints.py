"""Refusals with a correction for the client: mistyped base URLs, forms that are not accepted. Pure."""

from __future__ import annotations

from gateway_plugin.edge.error_pages import Refusal, answer
from gateway_plugin.errors import GatewayError, InvalidKey, InvalidRequest, NotFound, UnsupportedMediaType

_NO_BATCHES = NotFound(
    "There is no batch API. Send the requests one by one, many at a time: 'map_chat' of gateway_plugin.apps and of "
    "gateway_plugin.globus.GlobusClient does so, and its 'map_file' takes a file of requests at the site."
)
_WITHOUT_V1 = ("chat/completions", "completions", "embeddings", "models", "responses", "messages", "audio/", "images/")


def _hint(message: str) -> NotFound:
    return NotFound(f"There is no such path: {message}")


NO_PATH = Refusal(
    "path",
    NotFound("There is no such path. A client's base URL is the gateway's address with '/v1' at its end."),
    variants=(
        ("^/v1/v1", _hint("'/v1' is in it twice. The base URL ends in one '/v1'.")),
        ("//", _hint("it has a slash too many. The base URL ends in '/v1', without a slash.")),
        ("^/v1/?$", _hint("it is the base URL itself. A client adds the rest, such as '/chat/completions'.")),
        ("^/.+/$", _hint("leave out the slash at its end. The base URL ends in '/v1'.")),
        ("^/V1", _hint("it is '/v1', in lower case.")),
        ("^/v1/%u", _hint("it is in lower case, as in '/v1/chat/completions'.")),
        (
            "^/openai/deployments/",
            NotFound("Azure's paths are not served: use OpenAI's plain client, with a base URL ending in '/v1'."),
        ),
        *(
            (f"^{path}", _NO_BATCHES)
            for path in ("/v1/batches", "/v1/files", "/v1/messages/batches", "/batches", "/files")
        ),
        *((f"^/{path}", _hint(f"'/v1' is missing (/v1/{path}). The base URL ends in '/v1'.")) for path in _WITHOUT_V1),
        ("^/v1/engines", _hint("a model is named in the body, and the path is '/v1/completions'.")),
        (
            "^/.+/v1/",
            _hint("nothing stands before '/v1'. The base URL is the gateway's address with '/v1' at its end."),
        ),
        *(
            (
                f"^/{path}/",
                NotFound(f"{whose} API is not served: choose 'OpenAI-compatible', and a base URL ending in '/v1'."),
            )
            for path, whose in (("api", "Ollama's"), ("v1beta", "Google's"))
        ),
        (
            "^/v1/",
            _hint(
                "this is not served. Served are chat/completions, completions, embeddings, responses, messages, "
                "models, audio/transcriptions, audio/translations, audio/speech, images/generations, images/edits."
            ),
        ),
    ),
)
"""The message depends on the path, and is chosen by the refusal itself, at no cost to paths that are served."""

TWO_KEYS = Refusal(
    "two_keys",
    InvalidKey("The headers 'Authorization' and 'x-api-key' hold two different keys: send one, or the same in both."),
)
COMPRESSED = Refusal(
    "compressed",
    UnsupportedMediaType("Compressed request bodies are not taken: send the body as it is, without Content-Encoding."),
)
STREAM_OF_HTTP_1_0 = Refusal(
    "stream_of_http_1_0",
    InvalidRequest("A stream needs HTTP/1.1, and this request is HTTP/1.0: speak 1.1, or leave 'stream' out."),
)
"""HAProxy would send it chunked, which HTTP/1.0 does not have: the client would take chunk sizes for text."""

_SHORT_BYTES = 512


def plainer_words() -> str:
    """Rules of a door that replace two answers of vLLM: one not in OpenAI's form, one too terse.

    Only short answers of these two statuses are inspected, and not the refusals of the doors, which end no sooner than
    the request's body.
    """
    no_path = NotFound(
        "The model's engine does not serve this path: an embedding model has no chat, for example. See the model's "
        "'task' in GET /v1/models."
    )
    no_text = InvalidRequest(
        "The request body is not valid JSON in UTF-8; or, on a path that takes files, no valid form."
    )
    no_words = _instead(no_text, "-m sub 'error parsing the body'")
    return _instead(no_path, """-m beg '{"detail":"Not Found"'""") + no_words + _no_plain_text()


def _no_plain_text() -> str:
    """Replaces a failure that is not JSON, from any backend: the backend broke, and answered in its own format."""
    plain = "{ srv_id -m found } !{ res.hdr(content-type) -m sub json }"
    return "".join(
        f"  http-response return status {status} default-errorfiles if {{ status {status} }} {plain}\n"
        for status in (500, 502, 503, 504)
    )


def no_chunks(old: str) -> str:
    """Rules of a door for a chunked answer to a caller that does not support chunks (``old``: the condition).

    ``STREAM_OF_HTTP_1_0`` refuses before an engine works, if the edge sees ``stream`` in the body; this one sees all.
    """
    error = STREAM_OF_HTTP_1_0.error
    return f"  http-response return {answer(error)} if {old} {{ res.fhdr_cnt(transfer-encoding) gt 0 }}\n"


def _instead(error: GatewayError, said: str) -> str:
    short = f"{{ status {error.status} }} {{ srv_id -m found }} {{ res.hdr_val(content-length) lt {_SHORT_BYTES} }}"
    return f"""\
  http-response wait-for-body time 1s if {short}
  http-response return {answer(error)} if {short} {{ res.body {said} }}
"""
