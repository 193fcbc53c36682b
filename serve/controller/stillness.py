"""Which engines have requests in flight at the edge and send nothing: for their agents, which cannot see that. Pure.

Agents use it for engines that do not count their own work (``serve.agent.hanging``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gateway_plugin.edge.runtime import ServerStat
from serve.core.state import Fleet

STILL_S = 2.0
"""Still after this time without output by the edge's count, which counts a stream's bytes every 5 s (``contstats``)."""


@dataclass(frozen=True)
class Flow:
    """Output of an engine, with requests in flight."""

    bytes_out: int
    at: float
    """Time of the last change of ``bytes_out``, with something in flight."""


def flows(before: Mapping[str, Flow], fleet: Fleet, stats: Iterable[ServerStat], now: float) -> dict[str, Flow]:
    """The engines with requests in flight: (1) more came out, or nothing was in flight before; (2) unchanged."""
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
    """Node -> engine -> the report for its agent, after a reading at ``now`` (``before``: after the previous one).

    (1) Nothing has come out of it for ``STILL_S``: how much is in flight on it; (2) something came after such a while:
    0, as a report counts for some seconds: an engine that sends something now and then would be still all the time.
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
