"""What the edge answers by itself: JSON in OpenAI's form, as HAProxy configuration. Pure."""

from __future__ import annotations

import json

from gateway_plugin.errors import (
    BodyTooLarge,
    Forbidden,
    GatewayError,
    InvalidKey,
    InvalidRequest,
    NotFound,
)


class MethodNotAllowed(GatewayError):
    """The path is served, with another method."""

    status, code, kind = 405, "method_not_allowed", "invalid_request_error"


class RequestTimeout(GatewayError):
    """The client was too slow in sending its request."""

    status, code, kind = 408, "request_timeout", "invalid_request_error"


class RateLimited(GatewayError):
    """A key's limit was reached; the message says which."""

    status, code, kind, exit_code = 429, "rate_limited", "rate_limit_error", 75


class EngineBroke(GatewayError):
    """The engine, or the ingress, broke off before it had answered."""

    status, code = 502, "engine_broke_off"


class Unavailable(GatewayError):
    """Neither an engine nor the ingress takes requests now."""

    status, code = 503, "unavailable"


class UpstreamTimeout(GatewayError):
    """No answer within the edge's longest wait."""

    status, code = 504, "timeout"


def own_errors(header_bytes: int) -> tuple[GatewayError, ...]:
    """One error for every status that HAProxy may answer on its own account."""
    return (
        InvalidRequest(f"The request is malformed, or its head is over the gateway's limit of {header_bytes} bytes."),
        InvalidKey("This needs a valid API key."),
        Forbidden("This is not allowed."),
        NotFound("There is no such path."),
        MethodNotAllowed("The method is not allowed."),
        RequestTimeout("The request did not arrive within the gateway's limit of 30 seconds."),
        _with_status(BodyTooLarge(0), "The request body is larger than the gateway's limit."),
        RateLimited("A limit of this API key is reached. Try again later.", retry_after_s=1),
        _with_status(GatewayError(""), "The gateway's edge failed on this request."),
        EngineBroke("What serves the model broke off before it had answered. Try again."),
        Unavailable("Nothing can take this request now; the gateway is starting, or was stopped.", state="unavailable"),
        UpstreamTimeout("What serves the model did not answer in time."),
    )


def _with_status(error: GatewayError, message: str) -> GatewayError:
    error.message = message
    return error


def answer(error: GatewayError) -> str:
    """``status S content-type application/json string '...' hdr NAME VALUE``, for ``return`` and ``http-error``."""
    headers = "".join(f" hdr {name} {value}" for name, value in error.headers().items())
    if error.status == 401:
        headers += " hdr WWW-Authenticate Bearer"
    # In HAProxy's strong quotes, which take everything but themselves and ends of lines; JSON can do without both.
    body = json.dumps(error.body()).replace("'", r"\u0027")
    return f"status {error.status} content-type application/json string '{body}'{headers}"
