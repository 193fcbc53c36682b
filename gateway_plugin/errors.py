"""The errors of the gateway: each has its HTTP status, its code, its exit code, and can be pickled.

A ``GatewayError`` crosses process borders (ingress, controller, CLI, Parsl workers), so every subclass is rebuilt from
its constructor's arguments. ``code`` is stable and documented; the message is for people, with what to do next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class GatewayError(Exception):
    """Base of every error that the gateway reports to a user.

    Attributes:
        status: HTTP status of the answer that carries it.
        code: stable, machine-readable name (``error.code`` in OpenAI's form).
        exit_code: exit code of a CLI command that ends with it (sysexits.h where one fits).
        retried: ``False``: the answer stops clients that retry by themselves.
        retry_after_s: seconds after which a retry makes sense; ``None``: it does not.
        state: of the model of the request, or of the gateway, where relevant.
        eta_s: expected seconds until the model serves, where known.
        reason: what the model waits for, in the scheduler's terms where it is a job (``Resources``).
        detail: output of an engine or an agent, for administrators only.
        position: of the request among those that waited for its model, 1 for the next to be served.
    """

    status: int = 500
    code: str = "internal_error"
    kind: str = "server_error"
    exit_code: int = 70
    retried: bool = True

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        state: str | None = None,
        eta_s: float | None = None,
        reason: str | None = None,
        detail: str | None = None,
        position: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.state = state
        self.eta_s = eta_s
        self.reason = reason
        self.detail = detail
        self.position = position

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self.__dict__))

    def body(self, *, detail: bool = False) -> dict[str, Any]:
        """The error in OpenAI's form, with the gateway's fields: ``{"error": {"message", "type", "code", "param",
        "state"?, "eta_s"?, "reason"?, "position"?}}``. ``detail``: for an administrator."""
        message = f"{self.message} In full: {self.detail}" if detail and self.detail else self.message
        error: dict[str, Any] = {"message": message, "type": self.kind, "code": self.code, "param": None}
        if self.state is not None:
            error["state"] = self.state
        if self.status == 503:
            error["eta_s"] = self.eta_s
        if self.reason is not None:
            error["reason"] = self.reason
        if self.position is not None:
            error["position"] = self.position
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Extra response headers: ``Retry-After`` in whole seconds, always present on a 503; ``x-gateway-position``;
        and where it is not to be ``retried``, the one that stops OpenAI's clients."""
        found = {} if self.position is None else {"x-gateway-position": str(self.position)}
        found |= {} if self.retried else {"x-should-retry": "false"}
        if self.retry_after_s is not None:
            return {"Retry-After": str(max(1, round(self.retry_after_s))), **found}
        return {"Retry-After": "5", **found} if self.status == 503 else found


def _rebuild(cls: type[GatewayError], attributes: Mapping[str, Any]) -> GatewayError:
    error = cls.__new__(cls)
    Exception.__init__(error, attributes.get("message", ""))
    error.__dict__.update(attributes)
    return error


class InvalidRequest(GatewayError):
    """The request itself is wrong: no JSON, no model, a bad option."""

    status, code, kind, exit_code = 400, "invalid_request", "invalid_request_error", 64


class ConfigError(GatewayError):
    """A catalog, site or option is unknown or invalid. The message names the file, the key and what was expected."""

    status, code, kind, exit_code = 400, "invalid_configuration", "invalid_request_error", 2


class InvalidKey(GatewayError):
    """No API key, more than one, or one unknown to the gateway."""

    status, code, kind, exit_code = 401, "invalid_api_key", "authentication_error", 77


class Forbidden(GatewayError):
    """The key is valid but its role may not do this."""

    status, code, kind, exit_code = 403, "forbidden", "permission_error", 77


class ModelNotFound(GatewayError):
    """No catalog entry or alias has this name."""

    status, code, kind, exit_code = 404, "model_not_found", "invalid_request_error", 66

    def __init__(self, model: str, known: tuple[str, ...] = ()) -> None:
        hint = f" Known models: {', '.join(known[:8])}." if known else ""
        super().__init__(f"The model '{model}' is not in the catalog.{hint}")


class NotFound(GatewayError):
    """No such path, key or block."""

    status, code, kind, exit_code = 404, "not_found", "invalid_request_error", 66


class BodyTooLarge(GatewayError):
    """The request body is over the gateway's limit."""

    status, code, kind, exit_code = 413, "body_too_large", "invalid_request_error", 65

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request body is larger than the gateway's limit of {limit_bytes} bytes.")


class ModelQueueFull(GatewayError):
    """Too many requests already wait: for this model, or in total."""

    status, code, exit_code = 503, "model_queue_full", 75

    def __init__(self, model: str, limit: int, retry_after_s: float = 5.0) -> None:
        super().__init__(
            f"{limit} requests wait for models already, the gateway's limit; '{model}' was not queued. Try again.",
            retry_after_s=retry_after_s,
            state="queue_full",
            eta_s=retry_after_s,
        )


class ModelUnavailable(GatewayError):
    """The model could not be made ready: its engine failed, and the message gives the reason."""

    status, code, exit_code = 503, "model_unavailable", 75


class RelayFull(GatewayError):
    """The limit of requests that wait for models, or are answered through the ingress, is reached."""

    status, code, exit_code = 503, "relay_full", 75

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The gateway has {limit} requests whose models were not ready when they came, as many as it takes at a "
            "time (the site's limit relayed_requests). Requests for models that are ready are answered.",
            retry_after_s=5.0,
            state="busy",
        )


class NoRoom(GatewayError):
    """The model is larger than anything this site can provide."""

    status, code, exit_code = 503, "no_room", 75


class NoBlocks(GatewayError):
    """No block that could hold the model is available: they end early repeatedly, or can never start."""

    status, code, exit_code = 503, "no_blocks", 75


class WaitDeadline(GatewayError):
    """The model was not ready within the request's maximum waiting time."""

    status, code, exit_code = 503, "wait_deadline", 75


class DeadlineTooEarly(WaitDeadline):
    """The model is expected to be ready only after the request's own deadline: it does not wait at all."""

    code = "deadline_too_early"
    retried = False
    """Clients would sleep past the deadline by themselves."""


class NotRouted(GatewayError):
    """An engine reported as ready could not be reached through the edge."""

    status, code, exit_code = 503, "not_routed", 75


class RequestKilledEngine(GatewayError):
    """Two engines died while they worked on this request alone; it is not sent to another."""

    status, code, exit_code = 500, "request_killed_engine", 70
    retried = False


class EngineDiedOften(GatewayError):
    """Engines died repeatedly while they worked on this request among others."""

    status, code, exit_code = 503, "engine_died_often", 75


class Unloaded(GatewayError):
    """The model was unloaded by an administrator while the request waited for it."""

    status, code, exit_code = 503, "model_unloaded", 75


class GoingDown(GatewayError):
    """The gateway shuts down: requests in flight may end, new ones are refused."""

    status, code, exit_code = 503, "going_down", 75

    def __init__(self) -> None:
        super().__init__(
            "The gateway is going down: it takes no new request. Try again when it is up.",
            retry_after_s=30.0,
            state="going_down",
        )


class GatewayUnreachable(GatewayError):
    """Nothing answers at the gateway's address."""

    status, code, exit_code = 503, "gateway_unreachable", 69


class EdgeError(GatewayError):
    """The edge cannot be reached on its socket, or refused a command."""

    status, code, exit_code = 503, "edge_error", 69


class EdgeAway(EdgeError):
    """The edge does not answer on its socket: it restarts, or hangs. A retry makes sense."""


class ServiceError(GatewayError):
    """The gateway could not be started or stopped: a port in use, a missing package, a part that died."""

    status, code, exit_code = 500, "service_error", 69


class MethodNotAllowed(GatewayError):
    """The path is served, but with another method."""

    status, code, kind = 405, "method_not_allowed", "invalid_request_error"


class RequestTimeout(GatewayError):
    """The client was too slow in sending its request."""

    status, code, kind = 408, "request_timeout", "invalid_request_error"


class ClientClosed(GatewayError):
    """The client closed its connection, or its sending half, before the answer came."""

    status, code, kind = 499, "client_closed_request", "invalid_request_error"


class UnsupportedMediaType(GatewayError):
    """The request body is in a form that the gateway does not accept: compressed."""

    status, code, kind, exit_code = 415, "unsupported_media_type", "invalid_request_error", 65

    def headers(self) -> dict[str, str]:
        """Names the accepted form (RFC 9110, 15.5.16)."""
        return {"Accept-Encoding": "identity"}


class RateLimited(GatewayError):
    """A key's limit was reached; the message says which."""

    status, code, kind, exit_code = 429, "rate_limited", "rate_limit_error", 75


class EngineBroke(GatewayError):
    """The engine, or the ingress, closed the connection before its answer."""

    status, code = 502, "engine_broke_off"


class Unavailable(GatewayError):
    """Neither an engine nor the ingress accepts requests now."""

    status, code, exit_code = 503, "unavailable", 75


class EngineBusy(GatewayError):
    """The model is loaded, and its engines have as many requests as they take; others wait before this one."""

    status, code, exit_code = 503, "engine_busy", 75


class UpstreamTimeout(GatewayError):
    """No answer within the edge's longest timeout."""

    status, code = 504, "timeout"


class EndpointUnavailable(GatewayError):
    """Globus Compute, or the site's endpoint, cannot be reached or takes no tasks."""

    status, code, exit_code = 503, "endpoint_unavailable", 69


class TaskFailed(GatewayError):
    """A task ended at the endpoint without an answer from the gateway."""

    status, code, exit_code = 502, "task_failed", 70


class PromptTooLarge(GatewayError):
    """A single prompt is over the size limit of a submission to Globus Compute."""

    status, code, kind, exit_code = 413, "prompt_too_large", "invalid_request_error", 65


class NothingSaid(GatewayError):
    """The model reached ``max_tokens`` before any text of its answer, for example while reasoning."""

    status, code, kind, exit_code = 422, "nothing_said", "invalid_request_error", 65


class AnswerTooLarge(GatewayError):
    """The answer to one prompt is over the size limit of a Globus Compute result."""

    status, code, exit_code = 413, "result_too_large", 65
