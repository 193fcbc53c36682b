"""Keeps what the controller has learned of its models for the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway_plugin.clock import SteadyClock
from serve.controller.journal import Journal
from serve.controller.learned import given_back, kept
from serve.core.learned import Learned, learned
from serve.core.state import Fleet

_EACH_S = 60.0
"""A controller that is killed loses at most so much of it."""


class Memory:
    """Reads it once, and writes it every now and then."""

    def __init__(self, journal: Journal, clock: SteadyClock, fleet: Callable[[], Fleet]) -> None:
        self._journal = journal
        self._clock = clock
        self._fleet = fleet

    def read(self) -> Learned:
        """What the last controller left; nothing where its file cannot be read, which is logged. A use after now, as
        the clock was set back, was now at the latest: else none would be noted until then."""
        now = self._clock.now()
        return given_back(self._journal.learned(), lambda at: self._clock.steady(at, latest=now))

    async def write(self) -> None:
        """Now: also when the gateway shuts down."""
        found = kept(learned(self._fleet()), self._clock.wall)
        await asyncio.to_thread(self._journal.keep_learned, found)

    async def keep(self) -> None:
        """Write it again and again."""
        while True:
            await asyncio.sleep(_EACH_S)
            await self.write()
