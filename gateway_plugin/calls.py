"""A gateway's own calls: its models and their states, and administration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import httpx

from gateway_plugin.api_types import (
    ModelInfo,
    Status,
    Why,
    chat_body,
    parse_error,
    parse_model,
    parse_models,
    parse_status,
    parse_why,
    whole,
)
from gateway_plugin.channel import WAIT_HEADER, Channel, Item
from gateway_plugin.errors import Forbidden, GatewayError
from gateway_plugin.http_channel import not_a_gateway
from gateway_plugin.readiness import wait_until_ready

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
_CONNECT_S = 10.0
_APPLY_S = 180.0


class Calls:
    """One request and one answer each, over one channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.url, self.at_hand, self.streams = channel.url, channel.at_hand, channel.streams
        self._http = httpx.Client(
            base_url=channel.base_url,
            headers={"Authorization": f"Bearer {channel.key}"},
            timeout=httpx.Timeout(channel.answer_s, connect=_CONNECT_S),
            **channel.options(asynchronous=False),
        )

    # --- models ---
    def models(self, timeout_s: float | None = None) -> list[ModelInfo]:
        """Every model of the catalog with its state."""
        return parse_models(self._call("GET", "/v1/models", timeout_s=timeout_s))

    def model(self, name: str, timeout_s: float | None = None) -> ModelInfo:
        """One model, by name or alias. Raises ``ModelNotFound``."""
        return parse_model(self._call("GET", f"/v1/models/{quote(name, safe='/:@')}", timeout_s=timeout_s))

    def wait_until_ready(
        self,
        model: str,
        timeout_s: float = 1800.0,
        *,
        poll_s: float | None = None,
        failed_s: float = 10.0,
        report: Callable[[ModelInfo], None] = lambda found: None,
    ) -> ModelInfo:
        """Have ``model`` loaded, and return when it is ready.

        With an admin key the load is asked for. A user's key keeps a one-token request waiting for the model, whose own
        error ends the wait; through an endpoint such a request does not wait, and is repeated while the model is cold.
        ``report`` is called with each look that found it not ready.

        Raises:
            ModelNotFound: the catalog has no such model.
            ModelUnavailable: its engine fails to start, and the next try is more than ``failed_s`` seconds off; the
                message says how it failed, and to an administrator what the engine said last.
            WaitDeadline: not ready within ``timeout_s`` seconds, every look at it included.
        """
        channel = self._channel
        return wait_until_ready(
            lambda within_s: self.model(model, self._within(within_s)),
            self._load, timeout_s, poll_s=channel.poll_s if poll_s is None else poll_s, look_s=channel.look_s,
            failed_s=failed_s, report=report,
        )  # fmt: skip

    def _load(self, model: ModelInfo, within_s: float) -> Future[Any] | None:
        """Ask for it to be loaded. With a key that may not: a request for one token, which waits for the model and is
        worth a load as any other; through an endpoint one that does not wait, and asks for little.
        """
        with suppress(Forbidden):
            self.load(model.name)
            return None
        if model.task == "embed":
            path, asked = EMBEDDINGS, {"model": model.name, "input": "ready?"}
        else:
            path, asked = CHAT, chat_body("ready?", model.name, None, {"max_tokens": 1})
        if not self._channel.look_s:
            return self._channel.submit(Item(path, asked, whole, True, within_s))
        try:
            self._call("POST", path, asked, timeout_s=self._within(within_s), headers={WAIT_HEADER: "0"})
        except GatewayError as error:
            if error.status != 503:
                raise
        return None

    def _within(self, seconds: float) -> float:
        """How long a look may take: over HTTP it takes no time that matters."""
        return min(seconds, self._channel.answer_s) if self._channel.look_s else self._channel.answer_s

    # --- administrators ---
    def status(self) -> Status:
        """Models, engines, nodes, waiting requests and switches; of an endpoint: whether it is online."""
        return parse_status(self._call("GET", "/gateway/v1/status"))

    def why(self, model: str) -> Why:
        """Why a model is loaded, asleep, loading or waiting, and what would change it. Needs an admin key."""
        return parse_why(self._call("GET", f"/gateway/v1/models/why?model={quote(model, safe='')}"))

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

        Returns once engines that serve have loaded adapters that are new in it, at most ``_APPLY_S``. Raises
        ``ConfigError``.
        """
        self._call("POST", "/gateway/v1/models/apply", catalog, timeout_s=_APPLY_S)

    def blocks(self, *, ended: bool = False) -> list[dict[str, Any]]:
        """Every block that holds a place, those in the queue too; with ``ended`` those that ended recently as well.

        See docs/http.md for the keys.
        """
        found: list[dict[str, Any]] = self._call("GET", f"/gateway/v1/blocks{'?all=1' if ended else ''}")["blocks"]
        return found

    def retry_blocks(self, node_type: str) -> None:
        """Ask for blocks of ``node_type`` again although the last ones could not be started."""
        self._verb("blocks/retry", {"type": node_type})

    def drain_block(self, name: str) -> None:
        """Give a block back as soon as nothing is in flight on it. Raises ``NotFound``."""
        self._verb("blocks/drain", {"block": name})

    def cancel_block(self, name: str) -> None:
        """End a block at once, in the queue or running; what is in flight on it is cut. Raises ``NotFound``."""
        self._verb("blocks/cancel", {"block": name})

    # --- requests ---
    def _verb(self, verb: str, body: dict[str, Any]) -> None:
        self._call("POST", f"/gateway/v1/{verb}", body)

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        timeout = httpx.USE_CLIENT_DEFAULT if timeout_s is None else httpx.Timeout(timeout_s, connect=_CONNECT_S)
        try:
            response = self._http.request(method, path, json=body, timeout=timeout, headers=headers)
        except httpx.TransportError as error:
            raise self._channel.unreachable(error) from error
        try:
            document = response.json()
        except ValueError:
            document = None
        if response.is_success and document is not None:
            return document
        if response.is_success:
            raise not_a_gateway(self.url, path)
        raise parse_error(response.status_code, document, response.headers)
