"""Work in order within a lane, with lanes running concurrently: stuck work delays only its own lane."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Hashable
from typing import Any

log = logging.getLogger("gateway.controller")

Work = Callable[[], Coroutine[Any, Any, None]]


class Lanes:
    """Lanes by name; an empty one costs nothing. Failed work is logged, and the work behind it continues."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, deque[Work]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, lane: Hashable, work: Work) -> None:
        """Run ``work`` after all work added to ``lane`` before it."""
        waiting = self._waiting.get(lane)
        if waiting is not None:
            waiting.append(work)
            return
        self._waiting[lane] = deque((work,))
        self.beside(lambda: self._run(lane))

    def beside(self, work: Work) -> None:
        """Run ``work`` at once, in no lane."""
        task = asyncio.create_task(work())
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._done)

    async def _run(self, lane: Hashable) -> None:
        waiting = self._waiting[lane]
        try:
            while waiting:
                try:
                    await waiting.popleft()()
                except Exception:
                    log.exception("effect-failed", extra={"lane": repr(lane)})
        finally:
            del self._waiting[lane]

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("effect-failed", exc_info=task.exception())
