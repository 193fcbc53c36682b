"""Reports of agents on engines."""

from __future__ import annotations

from serve.core.effects import SleepEngine
from serve.core.events import (
    EngineAsleep,
    EngineAwake,
    EngineExited,
    EngineGrew,
    EngineListening,
    EngineMoves,
    EngineReady,
    EngineStalled,
    Event,
)
from serve.core.sleep_room import MAY_SLEEP
from serve.core.state import Engine, EngineState, Fleet, had_requests, ready_at
from serve.core.transaction import Transaction
from serve.core.transitions import (
    after_death,
    doubt_sleep,
    fell_asleep,
    forget,
    made_ready,
    record_failure,
    woke,
)


def engine_listening(tx: Transaction, event: EngineListening) -> None:
    engine = tx.engines.rows.get(event.engine)
    if engine is not None:
        tx.set_engine(engine, address=event.address)


def engine_ready(tx: Transaction, event: EngineReady) -> None:
    """It answered a real request: its route may open. (An agent made again asks the engines that it adopts, too; one
    that falls asleep or wakes has not heard the command, or is awake.)"""
    engine = tx.engines.rows.get(event.engine)
    if engine is None:
        return
    if engine.state is EngineState.FALLING_ASLEEP:
        tx.emit(SleepEngine(engine.id, engine.node, tx.epoch))
    elif engine.state is EngineState.WAKING:
        woke(tx, engine, None)
    elif engine.state is EngineState.LOADING:
        made_ready(
            tx, engine, event.address, event.load_s, can_sleep=event.can_sleep, sleep_mib=event.sleep_mib
        )  # fmt: skip


def engine_asleep(tx: Transaction, event: EngineAsleep) -> None:
    """Its GPUs are free. One that is being stopped meanwhile is stopped."""
    engine = tx.engines.rows.get(event.engine)
    if engine is not None and engine.state is EngineState.FALLING_ASLEEP:
        fell_asleep(tx, engine, event.sleep_mib, event.kept_mib)


def engine_awake(tx: Transaction, event: EngineAwake) -> None:
    """It answers as before it slept: its route may open."""
    engine = tx.engines.rows.get(event.engine)
    if engine is not None and engine.state is EngineState.WAKING:
        woke(tx, engine, event.took_s)


def engine_grew(tx: Transaction, event: EngineGrew) -> None:
    """Nothing changes: what engines hold is kept on the models' cards (``serve.core.views.cards``)."""


def engine_exited(tx: Transaction, event: EngineExited) -> None:
    """Its memory is free and its route is closed. Besides, if it was not asked to exit:

    (1) it was loading: a failed load; (2) it had just become ready: a failure too, so that a model that crashes on its
    first request is not loaded for ever; (3) later: an accident; it is loaded again on demand.
    (4) An engine that served until its eviction, however soon, shows that its model does not crash by itself.
    (5) Requests in flight may be the cause: then more such crashes are allowed.
    (6) Its sleep or its waking went wrong: no fault of its load. The model is loaded afresh when it is wanted.
    """
    engine = tx.engines.rows.get(event.engine)
    if engine is None:
        return
    forget(tx, engine)
    if _in_service(engine, event):
        after_death(tx, engine.model)
    if event.doubt or (not event.expected and engine.state in (EngineState.FALLING_ASLEEP, EngineState.WAKING)):  # (6)
        doubt_sleep(tx, engine.model)
        return
    if event.expected:
        failure = tx.failures.rows.get(engine.model)
        if failure is not None and failure.after_ready and engine.stop_reason in (*MAY_SLEEP, "slot-needed"):  # (4)
            tx.failures.drop(engine.model)
        return
    summary = event.summary or "it failed"
    if engine.state is EngineState.LOADING:  # (1)
        record_failure(tx, engine.model, event.reason, summary)
    elif engine.state is EngineState.READY and tx.now < ready_at(engine) + tx.policy.crash_window_s:  # (2)
        record_failure(tx, engine.model, event.reason, summary, after_ready=True, on_board=had_requests(engine))  # (5)


def _in_service(engine: Engine, event: EngineExited) -> bool:
    return not event.expected and engine.state in (EngineState.READY, EngineState.DRAINING)


def died_in_service(fleet: Fleet, event: Event) -> str | None:
    """The model of an engine that may have had requests and exited without a stop command; else ``None``."""
    if not isinstance(event, EngineExited):
        return None
    engine = fleet.engines.get(event.engine)
    if engine is None or not _in_service(engine, event):
        return None
    return engine.model


def engine_stalled(tx: Transaction, event: EngineStalled) -> None:
    engine = tx.engines.rows.get(event.engine)
    if engine is not None:
        in_flight = max(1, event.in_flight)
        tx.set_engine(engine, stalled_since=tx.now - event.still_s, stalled_with=in_flight)


def engine_moves(tx: Transaction, event: EngineMoves) -> None:
    engine = tx.engines.rows.get(event.engine)
    if engine is not None:
        tx.set_engine(engine, stalled_since=None)
