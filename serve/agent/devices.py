"""The GPUs of a node: on each, one engine at a time loads, stops, falls asleep or wakes.

The memory in use on a GPU is read for the whole GPU, by vLLM as it loads and by the agent at a sleep: no other engine
may change it meanwhile. The controller keeps to this too; here it holds even where the controller knows less.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection


class Lease:
    """GPUs taken; ``release`` may be called twice."""

    def __init__(self, devices: Devices, gpus: frozenset[int]) -> None:
        self._devices = devices
        self._gpus = gpus

    def release(self) -> None:
        """Let others take them."""
        gpus, self._gpus = self._gpus, frozenset()
        self._devices.free(gpus)


class Devices:
    """Which GPUs are taken."""

    def __init__(self) -> None:
        self._taken: set[int] = set()
        self._freed = asyncio.Event()

    async def take(self, gpus: Collection[int]) -> Lease:
        """Wait until none of them is taken, then take them; at once where there are none."""
        while not self._taken.isdisjoint(gpus):
            freed = self._freed
            await freed.wait()
        self._taken.update(gpus)
        return Lease(self, frozenset(gpus))

    @contextlib.asynccontextmanager
    async def alone(self, gpus: Collection[int]) -> AsyncIterator[None]:
        """As ``take``, until the block ends."""
        lease = await self.take(gpus)
        try:
            yield
        finally:
            lease.release()

    def free(self, gpus: frozenset[int]) -> None:
        """Of ``Lease.release``."""
        if gpus:
            self._taken -= gpus
            self._freed.set()
            self._freed = asyncio.Event()
