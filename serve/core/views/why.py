"""Why a model is loaded, asleep, loading, evicted or waiting, in sentences, and what would change it.

For administrators: it names other models. From the present fleet and its recorded decisions; where placement can weigh
a model against those that hold its room, it says so through ``Weighing``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from serve.core.events import Priority
from serve.core.forecast import Forecast, model_state, models_before, stall_words
from serve.core.room import Need, has_room, holds, need_of
from serve.core.state import Action, Decision, Engine, EngineState, Fleet, live, ready_at, stalled, stays, used_at
from serve.core.supply import describe

DECISIONS_SHOWN = 10
_DONE = {
    Action.LOAD: "its load began",
    Action.WAKE: "it was woken",
    Action.EVICT: "it was evicted",
    Action.SLEEP: "it was put to sleep",
    Action.STOP: "it was stopped",
    Action.KEEP: "it was kept",
    Action.WAIT: "it was left to wait",
}

Weighing = Callable[[Fleet, str, float], Sequence[str]]
"""Sentences on what a waiting model weighs against what holds its room: ``(fleet, model, now)``. Pure."""


def why_view(fleet: Fleet, model: str, now: float, weighing: Weighing | None = None) -> dict[str, Any]:
    """``{"model", "state", "why", "would_change", "decisions"}``: sentences, and the last decisions on the model or for
    its sake, the latest first: ``{"ago_s", "action", "model", "engine", "other", "because"}``.

    ``weighing``: of the placement policy in force; without it the forecast alone says why a model waits.
    """
    state = model_state(fleet, model)
    engines = [fleet.engines[name] for name in fleet.model_engines.get(model, ())]
    why = [sentence for engine in engines for sentence in _of_engine(fleet, engine, now)]
    change = _upkeep(fleet, model, engines, now)
    if not any(live(engine) for engine in engines):
        why += _without_engine(fleet, model, state, now)
        why += weighing(fleet, model, now) if weighing is not None and state == "queued" else ()
        change += _ways_to_room(fleet, model, state, now)
    why += _demand(fleet, model, now)
    decisions = [one for one in fleet.decisions if model in (one.model, one.other)][-DECISIONS_SHOWN:]
    return {
        "model": model,
        "state": state,
        "why": why,
        "would_change": change,
        "decisions": [_shown(one, now) for one in reversed(decisions)],
    }


def decision_words(decision: Decision) -> str:
    """One decision as a clause: ``it was evicted for b: its room is needed``."""
    done = _DONE[decision.action]
    other = f" for {decision.other}" if decision.other else ""
    return f"{done}{other}: {decision.because}"


def _shown(decision: Decision, now: float) -> dict[str, Any]:
    return {
        "ago_s": round(max(0.0, now - decision.at), 1),
        "action": decision.action.value,
        "model": decision.model,
        "engine": decision.engine or None,
        "other": decision.other or None,
        "because": decision.because,
    }


def _of_engine(fleet: Fleet, engine: Engine, now: float) -> list[str]:
    """Its state and since when; the decision that led to it."""
    here = f"Engine {engine.id} on node {engine.node}"
    for_s = _for(now - engine.since)
    found = []
    if engine.state is EngineState.LOADING:
        expected = fleet.load_s.get(engine.model, fleet.policy.load_guess_s)
        said = f"{here} has been loading for {_for(now - engine.started)}; a load takes about {expected:.0f} s."
    elif engine.state is EngineState.READY:
        busy = f"{_count(engine.in_flight, 'request')} in flight"
        busy += f", {engine.queued} more wait at the edge" if engine.queued else ""
        busy += "" if engine.in_flight else f", {_last_used(engine, now)}"
        said = f"{here} has served for {_for(now - ready_at(engine))}: {busy}."
    elif engine.state is EngineState.ASLEEP:
        wake = fleet.wake_s.get(engine.model)
        takes = "" if wake is None else f"; waking took {wake:.1f} s the last time"
        said = f"{here} has been asleep for {for_s}, its weights in {engine.sleep_mib} MiB of host memory{takes}."
    elif engine.state in (EngineState.DRAINING, EngineState.STOPPING):
        reason = f" ({engine.stop_reason})" if engine.stop_reason else ""
        left = f", {_count(engine.in_flight, 'request')} still in flight" if engine.in_flight else ""
        said = f"{here} has been {engine.state.value} for {for_s}{reason}{left}."
    else:
        said = f"{here} has been {engine.state.value} for {for_s}."
    found.append(said)
    last = next((one for one in reversed(fleet.decisions) if one.engine == engine.id), None)
    if last is not None:
        found.append(f"{_for(now - last.at)} ago {decision_words(last)}.")
    if (still := stall_words(fleet, engine, now)) is not None:
        found.append(f"It makes {still}.")
    return found


def _without_engine(fleet: Fleet, model: str, state: str, now: float) -> list[str]:
    """Why nothing of it serves or loads."""
    found = []
    failure = fleet.failures.get(model)
    if failure is not None:
        left = failure.retry_at - now
        again = f"; no load is tried for {left:.0f} s" if left > 0 else "; the next load is tried when it is wanted"
        many = _count(failure.count, "time")
        found.append(f"Its engine failed {many} in a row, the last time: {failure.reason.rstrip('.')}{again}.")
    weights = fleet.weights.get(model)
    if state == "fetching":
        found.append(f"It waits for its weights: {Forecast(fleet, now).waiting_reason(model)}.")
    elif weights is not None:
        found.append(f"Its weights are not on disk: {weights.detail.rstrip('.')}.")
    if state == "queued":
        reason = Forecast(fleet, now).waiting_reason(model, detail=True)
        found.append(f"It waits for room: {reason}." if reason else "It waits for room on a node.")
        if before := models_before(fleet, model):
            found.append(f"{_count(before, 'model')} that wait{'s' if before == 1 else ''} for room came earlier.")
    elif state == "cold":
        found.append("It is not loaded, and nothing asks for it.")
    last = next((one for one in reversed(fleet.decisions) if one.model == model), None)
    if last is not None:
        found.append(f"{_for(now - last.at)} ago {decision_words(last)}.")
    return found


def _demand(fleet: Fleet, model: str, now: float) -> list[str]:
    """Who wants it."""
    found = []
    waiters = [fleet.waiters[ticket] for ticket in fleet.queues.get(model, ())]
    if waiters:
        batch = sum(waiter.requester.priority is Priority.BATCH for waiter in waiters)
        users = len({(waiter.requester.key, waiter.requester.caller) for waiter in waiters})
        of_batch = f", {batch} of them batch" if batch else ""
        wait = "waits" if len(waiters) == 1 else "wait"
        oldest = _for(now - min(waiter.since for waiter in waiters))
        found.append(
            f"{_count(len(waiters), 'request')} of {_count(users, 'requester')} {wait} for it{of_batch}, "
            f"the oldest for {oldest}."
        )
    if model in fleet.pinned:
        found.append("It is pinned: it is loaded again by itself, and never evicted.")
    until = fleet.requested_until.get(model)
    if until is not None:
        forever = until == float("inf")
        found.append(
            "An administrator asked for it to be loaded."
            if forever
            else f"A client that was told to come again is expected within {_for(until - now)}."
        )
    return found


def _upkeep(fleet: Fleet, model: str, engines: Iterable[Engine], now: float) -> list[str]:
    """What would end what it has."""
    entry = fleet.models.get(model)
    found: list[str] = []
    for engine in engines:
        if engine.state is EngineState.LOADING and entry is not None:
            left = max(0.0, engine.started + entry.load_timeout_s - now)
            found.append(f"The load of {engine.id} fails if it is not ready in {_for(left)} (load_timeout).")
        elif engine.state is EngineState.READY:
            kept = _hold(fleet, engine, now)
            outweighed = fleet.policy.switching == "pressure" and engine.in_flight and model not in fleet.pinned
            until = "; waiters of another model that weigh more make it go all the same" if outweighed else ""
            found.append(
                f"{engine.id} keeps its place: {kept}{until}."
                if kept
                else f"{engine.id} is evicted when another model needs its room."
            )
            if entry is not None and entry.keep_alive_s >= 0 and model not in fleet.pinned and not engine.in_flight:
                left = max(used_at(engine), engine.granted_at) + entry.keep_alive_s - now
                found.append(f"Without a request it is unloaded in {_for(max(0.0, left))} (keep_alive).")
        elif engine.state is EngineState.DRAINING and engine.stop_reason in ("evicted", "idle", "handed-over"):
            found.append(f"A request for it now keeps {engine.id}, if its room is not taken by then.")
        elif engine.state is EngineState.ASLEEP:
            found.append(f"A request for it wakes {engine.id}, once there is room on the same GPUs.")
    return found


def _ways_to_room(fleet: Fleet, model: str, state: str, now: float) -> list[str]:
    """What would let it load: its weights; (1) nothing asks for it; (2) it backs off; (3) room; (4) what holds it, node
    by node; (5) node types that back off."""
    entry = fleet.models.get(model)
    if entry is None or state == "asleep":
        return []
    if state in ("cold", "draining"):  # (1)
        return [f"A request loads it, or 'gateway models load {model}'."]
    found = []
    if model in fleet.weights and not fleet.weights[model].may_fetch:
        return [f"'gateway models fetch {model}' fetches its weights."]
    failure = fleet.failures.get(model)
    if failure is not None and now < failure.retry_at:  # (2)
        found.append(f"'gateway models load {model}' tries again at once.")
    need = need_of(entry)
    large = [
        node for node in sorted(fleet.nodes.values(), key=lambda node: node.id) if stays(node) and holds(node, need)
    ]
    for node in large:
        if has_room(node, need):  # (3)
            found.append(f"Node {node.id} has room for it.")
            continue
        held = [_holder(fleet, fleet.engines[name], now) for name in node.engines]  # (4)
        found.append(f"Node {node.id} could hold it ({_needs(need)}) but for {'; '.join(held)}.")
    if not large:
        found.append(f"No node here could hold it ({_needs(need)}).")
    for kind in fleet.policy.node_types:
        backoff = fleet.backoffs.get(kind.name)
        if backoff is not None and holds(kind, need):  # (5)
            found.append(f"{describe(kind.name, backoff)}. 'gateway blocks retry {kind.name}' asks again at once.")
    return found


def _holder(fleet: Fleet, engine: Engine, now: float) -> str:
    return f"{engine.model} ({_hold(fleet, engine, now) or 'may be evicted'})"


def _hold(fleet: Fleet, engine: Engine, now: float) -> str:
    """Why an engine keeps its place now; empty: it may be evicted."""
    entry = fleet.models.get(engine.model)
    if engine.state is not EngineState.READY:
        return str(engine.state.value)
    if engine.model in fleet.pinned:
        return "pinned"
    if engine.in_flight and not stalled(engine):
        return f"{_count(engine.in_flight, 'request')} in flight"
    if engine.model in fleet.queues or engine.model in fleet.requested_until:
        return "wanted itself"
    left = 0.0 if entry is None else ready_at(engine) + entry.min_residency_s - now
    return f"loaded {_for(now - ready_at(engine))} ago, kept for {_for(left)} more (min_residency)" if left > 0 else ""


def _last_used(engine: Engine, now: float) -> str:
    return f"last used {_for(now - engine.last_used)} ago" if engine.last_used else "not used yet"


def _needs(need: Need) -> str:
    return f"{need.gpus} x {need.mib} MiB of GPU memory" if need.gpus else f"{need.mib} MiB of host memory"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _for(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
