"""The Python client: a real ``openai.OpenAI`` for inference, and the gateway's own verbs beside it.

    from gateway_plugin import Client

    with Client() as gateway:
        gateway.wait_until_ready("smollm2-135m-instruct")
        gateway.openai.chat.completions.create(model="smollm2-135m-instruct", messages=[...])

Needs neither Ray nor vLLM.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from openai import (
    APIConnectionError,
    APIError,
    APIStatusError,
    AsyncOpenAI,
    OpenAI,
    OpenAIError,
)

from gateway_plugin.api_types import FAILED, ModelInfo, Status, parse_error, parse_model, parse_models, parse_status
from gateway_plugin.connection import find_gateway, on_loopback
from gateway_plugin.errors import (
    Forbidden,
    GatewayError,
    GatewayUnreachable,
    ModelUnavailable,
    WaitDeadline,
)

REQUEST_TIMEOUT_S = 3600.0
"""Of one inference request: the gateway holds it while its model loads (half an hour, or as the site says)."""

_CONNECT_S = 10.0
_ANSWER_S = 60.0
_FAILED_GRACE_S = 10.0
_LIMITS = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
"""Those of ``openai``'s own client."""

_Transport = TypeVar("_Transport", httpx.HTTPTransport, httpx.AsyncHTTPTransport)


class Client:
    """One gateway, as a user or an administrator sees it. Thread-safe, as ``httpx`` and ``openai`` are.

    Args:
        base_url: such as ``https://127.0.0.1:8180``, with or without ``/v1``.
        api_key: what ``gateway keys create`` printed.
        state: a gateway's state folder, for one that runs on this machine or file system.
        ca: file with the certificates of the authority that vouches for the gateway: what ``gateway ca`` prints.
            Default: ``$GATEWAY_CA``, else ``$SSL_CERT_FILE``, else the system's.
        plain_http: send key and prompts also over plain HTTP, to whatever listens there. Default:
            ``$GATEWAY_PLAIN_HTTP`` is 1.
        timeout_s: of one inference request, waiting for the model included.
        transport: for tests.

    Raises:
        GatewayError: from every method, the one that the gateway answered with, or ``GatewayUnreachable``.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        state: str | Path | None = None,
        *,
        ca: str | Path | None = None,
        plain_http: bool | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._gateway = find_gateway(
            base_url, api_key, state, ca=ca, plain_http=True if transport is not None else plain_http
        )
        self.url, self._key = self._gateway.url, self._gateway.key
        self.timeout_s = timeout_s
        # A cluster's proxy settings are for the world outside: a gateway on this machine is not reached through one.
        self._trust_env = not on_loopback(self.url)
        self._base = self.url if self._gateway.door is None else "http://localhost"
        self._options: dict[str, Any] = {"trust_env": self._trust_env, "verify": self._gateway.verify()}
        self._http = httpx.Client(
            base_url=self._base,
            headers={"Authorization": f"Bearer {self._key}"},
            timeout=httpx.Timeout(_ANSWER_S, connect=_CONNECT_S),
            transport=transport or self._through_door(httpx.HTTPTransport),
            **self._options,
        )

    def _through_door(self, kind: Callable[..., _Transport]) -> _Transport | None:
        """A transport over the gateway's own socket, if that is the way; ``None``: ``httpx``'s default, to the URL."""
        door = self._gateway.door
        return None if door is None else kind(uds=str(door), limits=_LIMITS)

    @property
    def at_hand(self) -> bool:
        """Whether this is the machine and the user of the gateway."""
        return self._gateway.door is not None

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close connections; what ``openai`` and ``async_openai`` gave out included (the latter's on its own loop)."""
        self._http.close()
        if "openai" in self.__dict__:
            self.openai.close()

    @cached_property
    def openai(self) -> OpenAI:
        """The real one. Its errors are ``openai``'s own; ``gateway_error`` translates them."""
        client = httpx.Client(
            timeout=self.timeout_s, limits=_LIMITS, transport=self._through_door(httpx.HTTPTransport), **self._options
        )
        # openai's 2 is made of httpx and its 3 of httpx2, of which it takes either client.
        return OpenAI(base_url=f"{self._base}/v1", api_key=self._key, timeout=self.timeout_s, http_client=client)  # type: ignore[arg-type]

    @cached_property
    def async_openai(self) -> AsyncOpenAI:
        """The same for ``asyncio``; close it yourself (``await client.async_openai.close()``)."""
        transport = self._through_door(httpx.AsyncHTTPTransport)
        client = httpx.AsyncClient(timeout=self.timeout_s, limits=_LIMITS, transport=transport, **self._options)
        return AsyncOpenAI(base_url=f"{self._base}/v1", api_key=self._key, timeout=self.timeout_s, http_client=client)  # type: ignore[arg-type]

    # --- anybody with a key ---
    def models(self) -> list[ModelInfo]:
        """Every model of the catalog with its state."""
        return parse_models(self._get("/v1/models"))

    def model(self, name: str) -> ModelInfo:
        """One model, by name or alias. Raises ``ModelNotFound``."""
        return parse_model(self._get(f"/v1/models/{quote(name, safe='/:@')}"))

    def wait_until_ready(
        self, model: str, timeout_s: float = 1800.0, *, poll_s: float = 0.5, failed_s: float = _FAILED_GRACE_S
    ) -> ModelInfo:
        """Have ``model`` loaded, and return when it is ready.

        With an admin key the load is asked for; with a user's key a one-token request is sent, which waits for it.

        Raises:
            ModelNotFound: the catalog has no such model.
            ModelUnavailable: its engine fails to start, and the next try is more than ``failed_s`` seconds off; the
                message says how it failed, and to an administrator what the engine said last.
            WaitDeadline: not ready within ``timeout_s`` seconds.
        """
        deadline = time.monotonic() + timeout_s
        found = self.model(model)
        if found.ready:
            return found
        try:
            self.load(model)
        except Forbidden:
            self._touch(found, timeout_s)
        failed_since: float | None = None
        while not (found := self.model(model)).ready:
            # A failure may be an old one, and a new one is tried again after seconds: only one that lasts is told.
            failed_since = (failed_since or time.monotonic()) if found.state == FAILED else None
            if failed_since is not None and time.monotonic() - failed_since >= failed_s:
                raise ModelUnavailable(
                    f"The model '{found.name}' fails to load: {found.reason or 'no reason is known'}", state=FAILED
                )
            if time.monotonic() >= deadline:
                raise WaitDeadline(
                    f"The model '{found.name}' is {found.state} and was not ready within {timeout_s:.0f} s.",
                    state=found.state,
                    eta_s=found.eta_s,
                    reason=found.reason,
                )
            time.sleep(poll_s)
        return found

    def _touch(self, model: ModelInfo, timeout_s: float) -> None:
        # through httpx, not openai: no retries, and the same errors as everything here
        if model.task == "embed":
            path = "/v1/embeddings"
            body: dict[str, Any] = {"model": model.name, "input": "ready?"}
        else:
            path = "/v1/chat/completions"
            body = {"model": model.name, "messages": [{"role": "user", "content": "ready?"}], "max_tokens": 1}
        try:
            self._call("POST", path, body, timeout=httpx.Timeout(timeout_s, connect=_CONNECT_S))
        except GatewayError as error:
            if error.__cause__.__class__ is httpx.ReadTimeout:
                raise WaitDeadline(f"The model '{model.name}' was not ready within {timeout_s:.0f} s.") from None
            raise

    # --- administrators ---
    def status(self) -> Status:
        """Models, engines, nodes, waiting requests and switches."""
        return parse_status(self._get("/gateway/v1/status"))

    def load(self, model: str) -> None:
        """Ask for ``model`` to be loaded; returns at once."""
        self._verb("models/load", {"model": model})

    def unload(self, model: str) -> None:
        """Drain and stop ``model``'s engines, and forget its pin; requests that wait for it are refused."""
        self._verb("models/unload", {"model": model})

    def pin(self, model: str) -> None:
        """Load ``model`` and never evict it."""
        self._verb("models/pin", {"model": model})

    def unpin(self, model: str) -> None:
        """Let ``model`` be evicted again."""
        self._verb("models/unpin", {"model": model})

    def apply(self, catalog: dict[str, Any]) -> None:
        """Put another catalog in force, in the form of ``models.yaml``: ``{"models": {NAME: {...}}}``.

        Raises ``ConfigError``.
        """
        self._verb("models/apply", catalog)

    def blocks(self, *, ended: bool = False) -> list[dict[str, Any]]:
        """Every block that holds a place, those in the queue too; with ``ended`` those that ended lately as well.

        See docs/http.md for the keys.
        """
        found: list[dict[str, Any]] = self._get(f"/gateway/v1/blocks{'?all=1' if ended else ''}")["blocks"]
        return found

    def retry_blocks(self, node_type: str) -> None:
        """Ask for blocks of ``node_type`` again although the last ones could not be had."""
        self._verb("blocks/retry", {"type": node_type})

    def drain_block(self, name: str) -> None:
        """Give a block back as soon as nothing is in flight on it. Raises ``NotFound``."""
        self._verb("blocks/drain", {"block": name})

    def cancel_block(self, name: str) -> None:
        """End a block at once, in the queue or running; what is in flight on it is cut. Raises ``NotFound``."""
        self._verb("blocks/cancel", {"block": name})

    # --- transport ---
    def _get(self, path: str) -> Any:
        return self._call("GET", path)

    def _verb(self, verb: str, body: dict[str, Any]) -> None:
        self._call("POST", f"/gateway/v1/{verb}", body)

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout: httpx.Timeout | None = None
    ) -> Any:
        try:
            response = self._http.request(
                method, path, json=body, timeout=timeout if timeout is not None else httpx.USE_CLIENT_DEFAULT
            )
        except httpx.TransportError as error:
            raise unreachable(self.url, error, self.at_hand) from error
        try:
            document = response.json()
        except ValueError:
            document = None
        if response.is_success and document is not None:
            return document
        if response.is_success:
            raise GatewayUnreachable(f"What answers at {self.url} is not a gateway: {path} is no JSON there.")
        raise parse_error(response.status_code, document, response.headers)


def unreachable(url: str, error: BaseException, at_hand: bool) -> GatewayUnreachable:
    """What to say of a connection that there is none; ``at_hand``: the user can start the gateway here."""
    if (unproven := _unproven(error)) is not None:
        return GatewayUnreachable(
            f"What listens at {url} has not proved to be the gateway, and was sent nothing: {unproven}. Set GATEWAY_CA "
            "(or ca=) to a file with what 'gateway ca' prints there, and use a name or address that is in its "
            "certificate."
        )
    if at_hand:
        advice = "See 'gateway status'; 'gateway up' starts it."
    elif on_loopback(url):
        advice = (
            "That is this machine's own loopback: is the tunnel to the gateway's machine open, and at this port? "
            "Whether the gateway is up, those who run it see by 'gateway status' there."
        )
    else:
        advice = (
            "Is that its address (GATEWAY_URL), and can this machine reach it? A gateway on its machine's loopback "
            "takes a tunnel. Whether it is up, those who run it see by 'gateway status' there."
        )
    return GatewayUnreachable(
        f"The gateway at {url} does not answer ({type(error).__name__}: {error}). {advice}", retry_after_s=5.0
    )


def _unproven(error: BaseException | None) -> str | None:
    """What is wrong with the server's certificate, if that is why there was no connection."""
    for _ in range(8):  # httpx and its transport each put an error of their own around it
        if error is None:
            return None
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message or str(error)
        error = error.__cause__ or error.__context__
    return None


def gateway_error(error: OpenAIError, url: str, at_hand: bool = False) -> GatewayError:
    """What ``openai`` raised, as the gateway's own error (which survives pickling; ``openai``'s does not always).

    ``at_hand``: as ``Client.at_hand``.
    """
    if isinstance(error, APIStatusError):
        try:
            body = error.response.json()
        except ValueError:
            body = None
        return parse_error(error.status_code, body, dict(error.response.headers))
    if isinstance(error, APIConnectionError):
        return unreachable(url, error.__cause__ or error, at_hand)
    if isinstance(error, APIError):  # an error event in the middle of a stream
        return parse_error(503, {"error": error.body}, {})
    return GatewayError(f"The answer of the gateway at {url} could not be understood: {error}")
