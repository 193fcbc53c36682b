"""Which engines have requests in flight at the edge and send nothing: for their agents, who cannot see that. Pure.

Agents tell by it whether an engine that does not count its own work has any (``serve.agent.hanging``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gateway_plugin.edge.runtime import ServerStat
from serve.core.state import Fleet

STILL_S = 2.0
"""For so long nothing came out of it by the edge's count, which counts a stream's bytes every 5 s (``contstats``)."""


@dataclass(frozen=True)
class Flow:
    """What came out of an engine."""

    bytes_out: int
    at: float
    """Since when it has been so much, with something in flight."""


def flows(before: Mapping[str, Flow], fleet: Fleet, stats: Iterable[ServerStat], now: float) -> dict[str, Flow]:
    """The engines that have something in flight: (1) more came out, or nothing was in flight before; (2) as before."""
    by_place = {(stat.slot, stat.server, stat.address): stat for stat in stats}
    found: dict[str, Flow] = {}
    for engine in fleet.engines.values():
        if engine.slot is None or engine.server is None:
            continue
        stat = by_place.get((engine.slot, engine.server, engine.address))
        if stat is None or stat.in_flight == 0:
            continue
        last = before.get(engine.id)
        if last is None or last.bytes_out != stat.bytes_out:
            found[engine.id] = Flow(stat.bytes_out, now)  # (1)
        else:
            found[engine.id] = last  # (2)
    return found


def still(fleet: Fleet, before: Mapping[str, Flow], known: Mapping[str, Flow], now: float) -> dict[str, dict[str, int]]:
    """Node -> engine -> what its agent is to hear, after a look at ``now`` (``before``: after the one before it).

    (1) Nothing has come out of it for ``STILL_S``: how much is in flight on it; (2) something came after such a while:
    0, since a word counts for some seconds: one that sends something now and then would be still all the time.
    """
    told: dict[str, dict[str, int]] = {}
    for name, flow in known.items():
        engine, last = fleet.engines.get(name), before.get(name)
        if engine is None:
            continue
        if now >= flow.at + STILL_S:  # (1)
            told.setdefault(engine.node, {})[name] = max(1, engine.in_flight)
        elif last is not None and last.bytes_out != flow.bytes_out and now >= last.at + STILL_S:  # (2)
            told.setdefault(engine.node, {})[name] = 0
    return told
