"""The open calls of waiters at the controller, and their answers, in small batches."""

from __future__ import annotations

import asyncio
from collections import deque

from gateway_plugin.errors import GatewayError
from serve.core.effects import Answer

AT_A_TIME = 20
PAUSE_S = 0.01
"""Pause between two batches. An answer costs Serve about a millisecond on each side: a thousand at once would delay
status, and all other calls to the controller, by seconds."""


class Calls:
    """Every open call is answered once, or forgotten."""

    def __init__(self) -> None:
        self._open: dict[str, asyncio.Future[GatewayError | None]] = {}
        self._due: deque[tuple[asyncio.Future[GatewayError | None], GatewayError | None]] = deque()
        self._next: asyncio.Handle | None = None

    def open(self, ticket: str) -> asyncio.Future[GatewayError | None]:
        """The future that the call of this ticket awaits."""
        future: asyncio.Future[GatewayError | None] = asyncio.get_running_loop().create_future()
        self._open[ticket] = future
        return future

    def forget(self, ticket: str) -> None:
        """Its caller disconnected."""
        self._open.pop(ticket, None)

    def answer(self, answer: Answer) -> None:
        """Queue the answer to a call; answers are sent in the order of these calls."""
        future = self._open.pop(answer.ticket, None)
        if future is not None:
            self._due.append((future, answer.error))
            if self._next is None:
                self._next = asyncio.get_running_loop().call_soon(self._give)

    def _give(self) -> None:
        for _ in range(min(AT_A_TIME, len(self._due))):
            future, error = self._due.popleft()
            if not future.done():  # its caller disconnected meanwhile
                future.set_result(error)
        self._next = asyncio.get_running_loop().call_later(PAUSE_S, self._give) if self._due else None
