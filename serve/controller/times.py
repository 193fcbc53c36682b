"""Wall-clock times of other parts, converted to the controller's own clock for the core.

Each is converted once, when it is reported: if the wall clock is set later, a block still ends after the time left that
was reported.
"""

from __future__ import annotations

from dataclasses import replace

from gateway_plugin.clock import SteadyClock
from serve.core.events import Event, NodeJoined, NodeLeaves, SeenBlock


def agents_event(event: Event, clock: SteadyClock) -> Event:
    """An agent's event. (1) No engine has started later than now. (2) No notice ended before now."""
    now = clock.now()
    if isinstance(event, NodeJoined):  # (1)
        engines = (replace(engine, started=clock.steady(engine.started, latest=now)) for engine in event.engines)
        return replace(event, engines=tuple(engines))
    if isinstance(event, NodeLeaves):  # (2)
        return replace(event, until=max(now, clock.steady(event.until)))
    return event


class BlockTimes:
    """Converts the times of blocks, which the ledger repeats: the same value is always converted to the same time."""

    def __init__(self, clock: SteadyClock) -> None:
        self._clock = clock
        self._told: dict[tuple[str, str, float], float] = {}

    def convert(self, blocks: tuple[SeenBlock, ...]) -> tuple[SeenBlock, ...]:
        """All blocks of the ledger; conversions of other blocks are dropped.

        (1) Submitted and ended: not later than now. (2) Start of a job, which may be expected, and end of its walltime.
        """
        now = self._clock.now()
        before, self._told = self._told, {}

        def known(block: SeenBlock, what: str, at: float, latest: float | None = None) -> float:
            key = (block.name, what, at)
            self._told[key] = before[key] if key in before else self._clock.steady(at, latest=latest)
            return self._told[key]

        return tuple(
            replace(
                block,
                asked_at=known(block, "asked", block.asked_at, now),  # (1)
                ended_at=None if block.ended_at is None else known(block, "ended", block.ended_at, now),
                starts_at=None if block.starts_at is None else known(block, "starts", block.starts_at),  # (2)
                ends_at=None if block.ends_at is None else known(block, "ends", block.ends_at),
            )
            for block in blocks
        )
