"""Reads the blocks of the ledger and reports changes to the core.

The ledger is written by the pool, in Ray's monitor process, and may lie on a shared file system: it is read in a
thread, and only when the file was replaced since the last read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from gateway_plugin.blocks.ledger import Block, Ledger
from gateway_plugin.clock import SteadyClock
from gateway_plugin.errors import GatewayError
from gateway_plugin.paths import Layout
from serve.controller.times import BlockTimes
from serve.core.events import BlocksSeen, Event, SeenBlock

log = logging.getLogger("gateway.controller")

LOOK_S = 2.0
"""Interval of checks of the file."""


def seen_block(block: Block) -> SeenBlock:
    """A block of the ledger as the core's type; times by the wall clock."""
    return SeenBlock(
        name=block.name,
        type=block.type,
        phase=block.phase,
        asked_at=block.asked_at,
        job=block.job.id if block.job is not None else None,
        reason=block.reason,
        host=block.node,
        starts_at=block.starts_at,
        ends_at=block.ends_at,
        ended_at=block.ended_at,
        never_clears=block.never_clears,
    )


class LedgerWatch:
    """Watches one ledger."""

    def __init__(self, layout: Layout, post: Callable[[Event], None], clock: SteadyClock) -> None:
        self._ledger = Ledger(layout.ledger)
        self._post = post
        self._times = BlockTimes(clock)
        self._file: tuple[int, int, int] | None = None
        self._told = BlocksSeen(())
        self._trouble = ""

    async def watch(self) -> None:
        """Post ``BlocksSeen`` on every change of the ledger, without end."""
        while True:
            found = await asyncio.to_thread(self.look)
            if found is not None:
                self._post(found)
            await asyncio.sleep(LOOK_S)

    def look(self) -> BlocksSeen | None:
        """The blocks of the ledger, if they changed. Blocking; an error is logged once, and again when it changes."""
        try:
            found = self._ledger.path.stat()
            file = (found.st_ino, found.st_mtime_ns, found.st_size)
            if file == self._file:
                return None
            blocks = self._ledger.read()
        except FileNotFoundError:  # no block was ever requested
            return None
        except (OSError, GatewayError) as error:
            if str(error) != self._trouble:
                log.warning("ledger-unreadable", extra={"path": str(self._ledger.path), "error": str(error)})
            self._trouble = str(error)
            return None
        self._file, self._trouble = file, ""
        seen = BlocksSeen(self._times.convert(tuple(seen_block(blocks[name]) for name in sorted(blocks))))
        if seen == self._told:  # only Ray's tags changed, which the core ignores
            return None
        self._told = seen
        return seen
