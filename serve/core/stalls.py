"""Engines that have work and make no progress: what their agents say of them, and what people are told.

The agent ends such an engine at ``hang_after_s`` and reports its exit, which is one like any other. Until then nothing
is decided here, but that it may be evicted: what is in flight on it will not end, and others may wait for its room.
"""

from __future__ import annotations

from serve.core.change import Change
from serve.core.events import EngineMoves, EngineStalled
from serve.core.fleet import Engine, EngineState, Fleet, RouteState


def engine_stalled(change: Change, event: EngineStalled) -> None:
    engine = change.engines.rows.get(event.engine)
    if engine is not None and engine.generation == event.generation:
        in_flight = max(1, event.in_flight)
        change.set_engine(engine, still_since=change.now - event.still_s, still_with=in_flight)


def engine_moves(change: Change, event: EngineMoves) -> None:
    engine = change.engines.rows.get(event.engine)
    if engine is not None and engine.generation == event.generation:
        change.set_engine(engine, still_since=None)


def stalled(engine: Engine) -> bool:
    """It serves, as far as the edge knows, and does not move."""
    return (
        engine.still_since is not None and engine.state is EngineState.READY and engine.route is not RouteState.OPENING
    )


def stall_words(fleet: Fleet, engine: Engine, now: float) -> str | None:
    """For everybody: ``no progress for 40 s with 3 requests in flight; ended at 60 s``; ``None``: it moves."""
    model = fleet.models.get(engine.model)
    if engine.still_since is None or model is None:
        return None
    count = max(engine.in_flight, engine.still_with)
    requests = "1 request" if count == 1 else f"{count} requests"
    return (
        f"no progress for {max(0.0, now - engine.still_since):.0f} s with {requests} in flight; "
        f"ended at {model.hang_after_s:.0f} s"
    )
