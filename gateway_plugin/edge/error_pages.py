"""Error answers that the edge gives itself: JSON in OpenAI's form, as HAProxy configuration. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gateway_plugin.errors import (
    BodyTooLarge,
    ClientClosed,
    EngineBroke,
    Forbidden,
    GatewayError,
    InvalidKey,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RateLimited,
    RequestTimeout,
    Unavailable,
    UpstreamTimeout,
)
from gateway_plugin.passing import NOT_ROUTED


def own_errors() -> tuple[GatewayError, ...]:
    """One error for every status that HAProxy may answer by itself.

    Input that is not HTTP gets no JSON: HAProxy closes the connection with a short HTML page.
    """
    return (
        InvalidRequest("The request is malformed."),
        InvalidKey("This needs a valid API key."),
        Forbidden("This is not allowed."),
        NotFound("There is no such path."),
        MethodNotAllowed("The method is not allowed."),
        RequestTimeout("The request did not arrive within the gateway's limit of 30 seconds."),
        _with_message(BodyTooLarge(0), "The request body is larger than the gateway's limit."),
        RateLimited("A limit of this API key is reached. Try again later.", retry_after_s=1),
        GatewayError("The gateway's edge failed on this request."),
        EngineBroke("What serves the model broke off before it had answered. Try again."),
        Unavailable("Nothing can take this request now; the gateway is starting, or was stopped.", state="unavailable"),
        UpstreamTimeout("What serves the model did not answer in time."),
    )


def _with_message(error: GatewayError, message: str) -> GatewayError:
    error.message = message
    return error


def http_error(error: GatewayError, status: int | None = None) -> str:
    """A configuration line that replaces HAProxy's own answer for ``status`` (default: the error's status)."""
    return f"  http-error {answer(error, {NOT_ROUTED: '1'} if isinstance(error, EngineBroke) else {}, status)}"


def answer(error: GatewayError, more: Mapping[str, str] | None = None, status: int | None = None) -> str:
    """``error`` as HAProxy's rules give answers: its status (or ``status``), body and headers, and ``more`` headers."""
    # HAProxy's strong quotes allow everything but a quote and a line end; JSON needs neither.
    body = json.dumps(error.body()).replace("'", r"\u0027")
    headers = "".join(f" hdr {name} {value}" for name, value in {**error.headers(), **(more or {})}.items())
    return f"status {status or error.status} content-type application/json string '{body}'{headers}"


def client_left() -> str:
    """A backend's answer, not "malformed", to a caller that closed its sending half before the answer came.

    HAProxy treats it as a disconnected caller (``option abortonclose``) and answers 400 in both cases; the front door
    makes 499 of it.
    """
    error = ClientClosed(
        "The client closed its connection, or its sending half, before the answer came: keep both open."
    )
    return http_error(error, status=400)


@dataclass(frozen=True)
class Refusal:
    """An error that a rule of the front door answers with."""

    name: str
    """Name of the service in ``refuse.lua``."""
    error: GatewayError
    variants: tuple[tuple[str, GatewayError], ...] = ()
    """Lua pattern of the request's path -> another message with the same status; the first match counts."""

    def when(self, condition: str) -> str:
        """The rule: refuse if ``condition`` holds, and evaluate no further rule."""
        return f"  http-request use-service lua.refuse_{self.name} if {condition}"

    def at_once(self) -> str:
        """HAProxy's own refusal, unconditional, for a request that was read whole or is not to be read.

        Cheap; see ``refuse_script`` for the effect on a caller that is still sending.
        """
        return f"http-request return {answer(self.error, _challenge(self.error))}"


DRAINED_BYTES_PER_S = 8 << 20
"""Read rate for refused bodies, per key, and for all callers without a key together, over all connections.

Reading costs time of the one thread that all requests share. Above this rate the senders wait.
"""


def refuse_script(refusals: Iterable[Refusal]) -> str:
    """``refuse.lua``: one service for each refusal.

    Why Lua: HAProxy's own ``return`` closes the connection while the caller is still sending. Above some 200 KiB the
    kernel then resets it, and the caller sees "connection reset" instead of 401 or 413. This script answers at once and
    then reads and discards the body, at most at ``DRAINED_BYTES_PER_S``. It must not return before the end of the body:
    HAProxy would read the rest at full speed. A sender of single bytes can hold its connection as long as it likes, so
    the number of such connections is limited (``floods.refuse_outsiders``).
    """
    entries = "".join(
        f"refuse({_lua(r.name)}, {r.error.status}, {_headers(r.error)}, {_body(r.error)}{_variants(r)})\n"
        for r in refusals
    )
    return _SCRIPT + entries


_SCRIPT = f"""\
-- Written by the gateway; changed by 'gateway up' only.
local second, drained = 0, {{}}
local function may_read(who, bytes)
  local now = core.now().sec
  if now ~= second then second, drained = now, {{}} end
  local sum = drained[who] or 0
  if sum >= {DRAINED_BYTES_PER_S} then return false end
  drained[who] = sum + bytes
  return true
end

local function refuse(name, status, headers, usual, variants)
  core.register_service("refuse_" .. name, "http", function(applet)
    local body = usual
    for _, variant in ipairs(variants or {{}}) do
      if applet.path:find(variant[1]) then body = variant[2] break end
    end
    applet:set_status(status)
    for key, value in pairs(headers) do applet:add_header(key, value) end
    applet:add_header("content-type", "application/json")
    applet:add_header("content-length", tostring(#body))
    applet:start_response()
    if applet.method ~= "HEAD" then applet:send(body) end
    local who = applet:get_var("txn.key") or ""
    while true do
      local piece = applet:receive(16384)
      if piece == nil or #piece == 0 then break end
      while not may_read(who, #piece) do core.msleep(1000) end
    end
  end)
end
"""


def _challenge(error: GatewayError) -> dict[str, str]:
    return {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}


def _headers(error: GatewayError) -> str:
    said = {**error.headers(), **_challenge(error)}
    return "{" + ", ".join(f"[{_lua(name)}] = {_lua(value)}" for name, value in said.items()) + "}"


def _body(error: GatewayError) -> str:
    return _lua(json.dumps(error.body()))


def _variants(refusal: Refusal) -> str:
    pairs = ", ".join(f"{{{_lua(pattern)}, {_body(error)}}}" for pattern, error in refusal.variants)
    return f", {{{pairs}}}" if pairs else ""


def _lua(text: str) -> str:
    """A Lua string. Raises ``ValueError`` for characters that JSON would have escaped."""
    if not text.isascii() or not text.isprintable():
        raise ValueError(f"cannot be written into the edge's script: {text!r}")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
