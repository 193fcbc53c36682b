"""The tasks of an endpoint: what the client needs, and what becomes of a task that failed."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from enum import Enum
from typing import Any, Protocol

from gateway_plugin.errors import GatewayError


class Next(Enum):
    """What is worth trying after a failure."""

    AGAIN = "again"
    """The same batch with the same key: it is computed once, however often it arrives."""
    SMALLER = "smaller"
    """Half of the batch: something was over a limit."""
    NOTHING = "nothing"


class TransportError(Exception):
    """A task that was not submitted, or that ended without an answer."""

    def __init__(self, error: GatewayError, then: Next) -> None:
        super().__init__(error.message)
        self.error = error
        self.then = then


class Transport(Protocol):
    """One endpoint. ``submit`` is called by one thread; the rest by any."""

    def submit(self, group: str, request: Mapping[str, Any]) -> Future[Any]:
        """Send one task of the task group ``group``; its answer as it came, or what ``failure`` understands.

        Never blocks for longer than it takes to note the request down.
        """

    def failure(self, error: BaseException) -> TransportError:
        """What such a future's error means."""

    def tasks(self, group: str) -> list[Future[Any]]:
        """Every task that was ever sent in ``group``, by any process. Raises ``GatewayError``."""

    def endpoint(self) -> Mapping[str, Any]:
        """What the service knows of it: ``{"status": "online"|..., "details": ...}``. Raises ``GatewayError``."""

    def release(self, group: str) -> None:
        """Expect nothing more of ``group``; never blocks."""

    def close(self) -> None:
        """Expect nothing more at all; never blocks."""
