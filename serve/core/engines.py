"""An engine's life: it listens, gets ready, exits; loads that take too long or that nobody wants; idle ones."""

from __future__ import annotations

from serve.core.apart import after_death
from serve.core.change import Change, ready_at
from serve.core.events import EngineExited, EngineListening, EngineReady, Event, ModelAnswered
from serve.core.eviction import had_requests, idle, unclaimed
from serve.core.fleet import Engine, EngineState, Fleet
from serve.core.routes import close_route, retire
from serve.core.waiting import record_failure


def _known(change: Change, engine_id: str, generation: int) -> Engine | None:
    """The engine that an agent speaks of, or ``None`` if the word is stale."""
    engine = change.engines.rows.get(engine_id)
    return engine if engine is not None and engine.generation == generation else None


def engine_listening(change: Change, event: EngineListening) -> None:
    engine = _known(change, event.engine, event.generation)
    if engine is not None:
        change.set_engine(engine, address=event.address)


def engine_ready(change: Change, event: EngineReady) -> None:
    """It answered a real request: its route may open."""
    engine = _known(change, event.engine, event.generation)
    if engine is not None and engine.state is EngineState.LOADING:
        made_ready(change, engine, event.address, event.load_s)


def made_ready(change: Change, engine: Engine, address: str, load_s: float | None) -> None:
    change.set_engine(
        engine,
        state=EngineState.READY,
        since=change.now,
        loaded_s=max(0.0, change.now - engine.started),
        address=address,
        orphaned_since=None,
        answered_at=change.now,
    )
    if load_s is not None:
        change.load_s.put(engine.model, load_s)
    failure = change.failures.rows.get(engine.model)
    if failure is not None and not failure.after_ready:
        change.failures.drop(engine.model)


def engine_exited(change: Change, event: EngineExited) -> None:
    """Its memory is free and its route is closed. Besides, if nobody asked for it:

    (1) it was loading: a failed load; (2) it had just become ready: a failure too, so that a model that dies under its
    first request is not loaded for ever; (3) later: an accident; it is loaded again when somebody wants it.
    (4) An engine that served until it made room, however soon, shows that its model does not crash by itself.
    (5) A request that it had may be the cause: then it takes more of them.
    """
    engine = _known(change, event.engine, event.generation)
    if engine is None:
        return
    forget(change, engine)
    if _in_service(engine, event):
        after_death(change, engine.model)
    if event.expected:
        failure = change.failures.rows.get(engine.model)
        if failure is not None and failure.after_ready and engine.stop_reason in ("evicted", "idle"):  # (4)
            change.failures.drop(engine.model)
        return
    summary = event.summary or "it failed"
    if engine.state is EngineState.LOADING:  # (1)
        record_failure(change, engine.model, event.reason, summary)
    elif engine.state is EngineState.READY and change.now < ready_at(engine) + change.policy.crash_window_s:  # (2)
        record_failure(
            change, engine.model, event.reason, summary, after_ready=True, on_board=had_requests(engine)
        )  # (5)


def _in_service(engine: Engine, event: EngineExited) -> bool:
    return not event.expected and engine.state in (EngineState.READY, EngineState.DRAINING)


def died_in_service(fleet: Fleet, event: Event) -> str | None:
    """The model of an engine that may have had requests and exited with nobody asking for it; else ``None``."""
    if not isinstance(event, EngineExited):
        return None
    engine = fleet.engines.get(event.engine)
    if engine is None or engine.generation != event.generation or not _in_service(engine, event):
        return None
    return engine.model


def model_answered(change: Change, event: ModelAnswered) -> None:
    """Its engines answer: what they died of is not the model itself."""
    model = change.names.get(event.model, event.model)
    failure = change.failures.rows.get(model)
    if failure is not None and failure.after_ready:
        change.failures.drop(model)


def forget(change: Change, engine: Engine) -> None:
    """Its process is gone."""
    close_route(change, engine)
    change.drop_engine(change.engines.rows[engine.id])


def review(change: Change) -> None:
    """What time brings to engines (nothing on nodes whose agent is away):

    (1) a load that takes longer than ``load_timeout_s`` failed;
    (2) a load that nobody wants any more goes on, unless somebody else needs its room (``serve.core.eviction``): who
        gave up waiting for it most likely comes again;
    (3) a route that the edge refused too often: the engine is of no use;
    (4) an idle engine past its ``keep_alive_s`` (and ``min_residency_s``) is unloaded, unless wanted; one that nobody
        has used since it was ready has ``unclaimed_s`` at least.
    """
    policy, now = change.policy, change.now
    for engine in list(change.engines.rows.values()):
        model = change.models.get(engine.model)
        if model is None:
            continue
        if engine.state is EngineState.READY:
            if engine.refusals >= policy.route_refusals_max:  # (3)
                retire(change, engine, "failed")
                record_failure(change, engine.model, "the edge did not take its route.")
            elif (
                model.keep_alive_s >= 0
                and engine.in_flight == 0
                and now >= engine.last_used + model.keep_alive_s
                and now >= max(engine.last_used, engine.answered_at, ready_at(engine)) + model.keep_alive_s
                and now >= ready_at(engine) + model.min_residency_s
                and not unclaimed(change, engine)
                and idle(change, engine)
                and not change.wanted(engine.model)
                and change.reachable(engine)
            ):  # (4)
                retire(change, engine, "idle")
        elif engine.state is EngineState.LOADING and change.reachable(engine):
            if now >= engine.started + model.load_timeout_s:  # (1)
                retire(change, engine, "load-timeout")
                record_failure(change, engine.model, f"not ready within {model.load_timeout_s:.0f} s.")
            elif change.wanted(engine.model) or engine.takes_over:
                if engine.orphaned_since is not None:
                    change.set_engine(engine, orphaned_since=None)
            elif engine.orphaned_since is None:  # (2)
                change.set_engine(engine, orphaned_since=now)


def forgive(change: Change) -> None:
    """A model whose engine stayed up for ``crash_window_s`` is no longer one that crashes."""
    for model, failure in list(change.failures.rows.items()):
        if failure.after_ready and any(
            engine.state is EngineState.READY and change.now >= ready_at(engine) + change.policy.crash_window_s
            for engine in change.engines_of(model)
        ):
            change.failures.drop(model)
