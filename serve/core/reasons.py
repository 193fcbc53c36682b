"""Reasons of decisions on engines, recorded where their states change (``Transaction.decide``).

Some are known only where they are decided and are recorded there: loads and evictions by placement, before it changes
the engine (what is recorded here for an eviction gives way to that), and stops for a reason that is not listed here.
"""

from __future__ import annotations

from serve.core.state import Action, Engine, Failure, used_at
from serve.core.transaction import Transaction

_STOPPED = {
    "unloaded": "an administrator unloaded it",
    "catalog": "the catalog has no such entry any more, or another one",
    "no-slot": "no slot at the edge was free for it",
    "abandoned": "another engine of its model loads already",
    "over-committed": "its node's memory does not suffice for all engines found there",
    "slot-needed": "its slot at the edge is needed for another model",
    "surplus": "fewer engines suffice for what its model is asked",
    "sleep-timeout": "it did not fall asleep in time",
    "wake-timeout": "it did not wake in time",
    "failed": "the edge refused its route again and again",
    "handed-over": "its node ends, and another engine of its model serves on a node that stays",
    "node-ends": "the end of its node is near",
    "node-leaving": "its node is given back",
}


def decide_stop(tx: Transaction, engine: Engine, reason: str) -> None:
    """``engine`` is drained and stopped for ``reason``, as in ``Engine.stop_reason``."""
    if reason == "evicted":
        if not _evicted_already(tx, engine):
            tx.decide(Action.EVICT, engine.model, "its room is needed for another model", engine=engine.id)
        return
    because = _why_stopped(tx, engine, reason)
    if because is not None:
        tx.decide(Action.STOP, engine.model, because, engine=engine.id)


def decide_keep(tx: Transaction, engine: Engine) -> None:
    """The drain of ``engine`` is cancelled."""
    tx.decide(Action.KEEP, engine.model, "it is wanted again before its drain was over", engine=engine.id)


def decide_wait(tx: Transaction, model: str, failure: Failure) -> None:
    """No load of ``model`` before ``failure.retry_at``; a failure that costs no time is no such decision."""
    left_s = failure.retry_at - tx.now
    if left_s > 0:
        many = "" if failure.count == 1 else f" {failure.count} times in a row"
        summary = failure.summary.rstrip(".")
        tx.decide(Action.WAIT, model, f"its engine failed{many} ({summary}); no load is tried for {left_s:.0f} s")


def _why_stopped(tx: Transaction, engine: Engine, reason: str) -> str | None:
    model = tx.models.get(engine.model)
    if reason == "idle" and model is not None:
        unused_s = tx.now - max(used_at(engine), engine.granted_at)
        return f"nothing was sent to it for {unused_s:.0f} s, and keep_alive is {model.keep_alive_s:.0f} s"
    if reason == "load-timeout" and model is not None:
        return f"it was not ready within {model.load_timeout_s:.0f} s (load_timeout)"
    return _STOPPED.get(reason)


def _evicted_already(tx: Transaction, engine: Engine) -> bool:
    last = next((one for one in reversed(tx.decisions) if one.model == engine.model), None)
    return last is not None and last.action is Action.EVICT and last.engine == engine.id
