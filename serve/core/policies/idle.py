"""Engines over time: load timeouts, unwanted loads, keep-alive."""

from __future__ import annotations

from serve.core.engine_use import idle, unclaimed
from serve.core.looking import not_just_busy
from serve.core.state import EngineState, ready_at
from serve.core.table import seen
from serve.core.transaction import Transaction
from serve.core.transitions import begin_stop, doubt_sleep, record_failure

_UNDER_WAY = {EngineState.FALLING_ASLEEP: "sleep-timeout", EngineState.WAKING: "wake-timeout"}


def review(tx: Transaction) -> None:
    """Time limits of engines (nothing on nodes whose agent is away):

    (1) a load that takes longer than ``load_timeout_s`` failed;
    (2) a load without demand goes on, as its client most likely comes again, but may be evicted for another model
        (``serve.core.policies.eviction``);
    (3) a route that the edge refused too often: the engine is stopped;
    (4) an idle engine past its ``keep_alive_s`` (and ``min_residency_s``) is unloaded, unless wanted; one that has had
        no request since it was ready is kept for ``unclaimed_s`` at least;
    (5) a sleep or a wake that takes longer than a load may: it is stopped, and its model loaded afresh.
    """
    policy, now = tx.policy, tx.now
    for engine in seen(tx.engines.rows, not_just_busy):
        model = tx.models.get(engine.model)
        if model is None:
            continue
        if engine.state is EngineState.READY:
            if engine.refusals >= policy.route_refusals_max:  # (3)
                begin_stop(tx, engine, "failed")
                record_failure(tx, engine.model, "the edge did not take its route.")
            elif (
                model.keep_alive_s >= 0
                and engine.in_flight == 0
                and now >= engine.last_used + model.keep_alive_s
                and now >= max(engine.last_used, engine.granted_at, ready_at(engine)) + model.keep_alive_s
                and now >= ready_at(engine) + model.min_residency_s
                and not unclaimed(tx, engine)
                and idle(tx, engine)
                and not tx.wanted(engine.model)
                and tx.reachable(engine)
            ):  # (4)
                begin_stop(tx, engine, "idle")
        elif engine.state in _UNDER_WAY and tx.reachable(engine):
            if now >= engine.since + model.load_timeout_s:  # (5)
                doubt_sleep(tx, engine.model)
                begin_stop(tx, engine, _UNDER_WAY[engine.state])
        elif engine.state is EngineState.LOADING and tx.reachable(engine):
            if now >= engine.started + model.load_timeout_s:  # (1)
                begin_stop(tx, engine, "load-timeout")
                record_failure(tx, engine.model, f"not ready within {model.load_timeout_s:.0f} s.")
            elif tx.wanted(engine.model) or engine.takes_over:
                if engine.unwanted_since is not None:
                    tx.set_engine(engine, unwanted_since=None)
            elif engine.unwanted_since is None:  # (2)
                tx.set_engine(engine, unwanted_since=now)


def clear_crashes(tx: Transaction) -> None:
    """The crash count of a model is cleared once an engine of it has stayed up for ``crash_window_s``."""
    for model, failure in list(tx.failures.rows.items()):
        if failure.after_ready and any(
            engine.state is EngineState.READY and tx.now >= ready_at(engine) + tx.policy.crash_window_s
            for engine in tx.engines_of(model)
        ):
            tx.failures.drop(model)
