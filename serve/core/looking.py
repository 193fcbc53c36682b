"""What the passes over a fleet look for in its nodes and engines: pure functions of the rows, for ``table.seen``.

Most nodes and engines of a large fleet just serve, and nothing is decided on them: a pass visits the others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from serve.core.state import Engine, EngineState, Node, NodePhase, RouteState


def not_just_serving(nodes: Mapping[str, Node]) -> Sequence[Node]:
    """Nodes that pend, end, leave or have no engine."""
    return [
        node
        for node in nodes.values()
        if not node.engines or node.ending or node.drain_asked or node.phase is not NodePhase.UP
    ]


def by_type(nodes: Mapping[str, Node]) -> Mapping[str, int]:
    """Node type -> how many there are."""
    return Counter([node.type for node in nodes.values()])


def first_drain_at(nodes: Mapping[str, Node]) -> float:
    """When the first node drains because it ends."""
    return min([node.drain_at for node in nodes.values() if node.drain_at is not None], default=math.inf)


def not_just_busy(engines: Mapping[str, Engine]) -> Sequence[Engine]:
    """Engines with nothing in flight, and those that do not serve."""
    return [
        one
        for one in engines.values()
        if not one.in_flight or one.route is not RouteState.OPEN or one.state is not EngineState.READY
    ]


def slots_taken(engines: Mapping[str, Engine]) -> frozenset[int]:
    """The slots of engines."""
    return frozenset([engine.slot for engine in engines.values() if engine.slot is not None])
