"""Waiters: who waits for what, what each is told, and what is known of how long it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gateway_plugin.catalog import Model
from gateway_plugin.errors import (
    GatewayError,
    ModelNotFound,
    ModelQueueFull,
    ModelUnavailable,
    NoBlocks,
    NoRoom,
    WaitDeadline,
)
from serve.core import beside
from serve.core.blocks import stays
from serve.core.change import Change, live
from serve.core.effects import Answer, Effect
from serve.core.events import Acquire, WaiterLeft
from serve.core.eviction import Need, Room
from serve.core.expected import ask_s, next_node, why_none
from serve.core.fleet import (
    Engine,
    EngineState,
    Failure,
    Fleet,
    Node,
    NodeKind,
    NodePhase,
    RouteState,
    Trouble,
    Waiter,
)
from serve.core.placement import could_ever_hold, holds, need_of
from serve.core.routes import doubt
from serve.core.stalls import stalled
from serve.core.troubles import withdrawn, words

_PROMISE_STEP_S = 0.5
"""``Engine.answered_at`` is not rewritten for every answer of a busy model."""


def serving(engine: Engine) -> bool:
    """A request sent to the edge now finds it."""
    return engine.state is EngineState.READY and engine.route is RouteState.OPEN and engine.up


def go_at_once(fleet: Fleet, event: Acquire, now: float) -> tuple[Fleet, tuple[Effect, ...]] | None:
    """The short way for a model that serves: no settling, mostly no change. ``None``: the long way."""
    model = fleet.names.get(event.model)
    if model is None or event.not_routed or event.ticket in fleet.waiters:
        return None
    for engine in fleet.model_engines.get(model, ()):
        if serving(fleet.engines[engine]):
            answer = (Answer(event.ticket),)
            if now < fleet.engines[engine].answered_at + _PROMISE_STEP_S:
                return fleet, answer
            change = Change(fleet, now)
            _promise(change, model)
            return change.commit(), answer
    return None


def _promise(change: Change, model: str) -> None:
    """A request is on its way to any of these: they are not idle for a moment."""
    for engine in change.engines_of(model):
        if serving(engine):
            change.set_engine(engine, answered_at=change.now)


def acquire(change: Change, event: Acquire) -> None:
    """One request for a model that does not serve (``go_at_once`` saw to those that do).

    (1) it waits already; (2) unknown model (before the catalog is known: wait and see); (3) it was told to go and the
    edge had no usable server; (4) larger than anything here, or than anything that can be had for a while; (5) its
    loads failed too often and the back-off is not over; (6) too many wait; (7) it does not wait: it hears at once how
    things stand, and nothing is done for it; (8) wait.
    """
    if event.ticket in change.waiters.rows:  # (1)
        return
    name = change.names.get(event.model)
    if name is None and (change.settled or change.models):  # (2)
        change.emit(Answer(event.ticket, ModelNotFound(event.model, tuple(change.models))))
        return
    if name is not None and event.not_routed:  # (3)
        doubt(change, name)
    model = change.models.get(name or "")
    failure = change.failures.rows.get(name or "")
    if model is not None and change.settled and not any(map(live, change.engines_of(model.name))):
        hopeless = _hopeless(change, model)
        if hopeless is not None:  # (4)
            change.emit(Answer(event.ticket, hopeless))
            return
        if failure is not None and failure.count >= change.policy.failures_per_wait and change.now < failure.retry_at:
            change.emit(Answer(event.ticket, _unavailable(model.name, failure, change.now)))  # (5)
            return
    if len(change.waiters.rows) >= change.policy.waiting_max:  # (6)
        change.emit(Answer(event.ticket, ModelQueueFull(event.model, change.policy.waiting_max)))
        return
    waiter = Waiter(event.ticket, name or event.model, change.now, change.now + event.wait_s, event.unattended)
    change.add_waiter(waiter)
    if event.wait_s <= 0:  # (7)
        answer_overdue(change)


def waiter_left(change: Change, event: WaiterLeft) -> None:
    if event.ticket in change.waiters.rows:
        change.drop_waiter(event.ticket)


def answer_all(change: Change, model: str, error: GatewayError | None) -> None:
    """One answer for every waiter of ``model``, in the order they came."""
    for ticket in change.queues.rows.get(model, ()):
        change.drop_waiter(ticket)
        change.emit(Answer(ticket, error))


def answer_ready(change: Change) -> None:
    """Tell the waiters of every model that serves to go."""
    for model in sorted(change.queues.rows):
        if any(serving(engine) for engine in change.engines_of(model)):
            answer_all(change, model, None)
            _promise(change, model)


def answer_overdue(change: Change) -> None:
    """Refuse waiters whose deadline has passed, with the state of their model.

    Who hears when to come back shall find what was asked for: a model that waits for a block stays wanted until a while
    after that, or the block would lose its place in a queue that is longer than anybody waits. (Of those who do not
    wait at all one at a time is believed.)
    """
    for model in [model for model, until in change.wished.rows.items() if change.now >= until]:
        change.wished.drop(model)
    fleet: Fleet | None = None
    for waiter in list(change.waiters.rows.values()):
        if change.now >= waiter.deadline:
            fleet = fleet or change.commit()
            state = model_state(fleet, waiter.model)
            eta = eta_s(fleet, waiter.model, change.now)
            reason = waiting_reason(fleet, waiter.model, change.now)
            detail = waiting_reason(fleet, waiter.model, change.now, detail=True)
            in_a_hurry = waiter.unattended or waiter.deadline <= waiter.since
            if eta is not None and state == "queued" and not (in_a_hurry and change.wished.rows):
                _expect_back(change, fleet, waiter.model, eta)
            change.drop_waiter(waiter.ticket)
            waited = change.now - waiter.since
            why = f"state: {state}" if reason is None else f"state: {state}; {reason}"
            error = WaitDeadline(
                f"The model '{waiter.model}' was not ready after {waited:.0f} s ({why}). Try again later.",
                retry_after_s=5.0 if eta is None else max(1.0, eta),
                state=state,
                eta_s=eta,
                reason=reason,
                detail=None if detail == reason else detail,
            )
            change.emit(Answer(waiter.ticket, error))


def _expect_back(change: Change, fleet: Fleet, model: str, eta_s: float) -> None:
    if next_node(fleet, need_of(change.models[model]), change.now) is None:
        return
    policy = change.policy
    until = change.now + min(eta_s + policy.pending_idle_s, policy.promise_max_s)
    change.wished.put(model, max(until, change.wished.rows.get(model, until)))


def resolve_names(change: Change) -> None:
    """The catalog is known: waiters that came before get their model, or hear that there is none."""
    for waiter in list(change.waiters.rows.values()):
        name = change.names.get(waiter.model)
        if name == waiter.model:
            continue
        change.drop_waiter(waiter.ticket)
        if name is None:
            change.emit(Answer(waiter.ticket, ModelNotFound(waiter.model, tuple(change.models))))
        else:
            change.add_waiter(replace(waiter, model=name))


def refuse_hopeless(change: Change, unplaced: tuple[str, ...]) -> None:
    """Waiters for models that nothing here could ever hold, or nothing that can be had for a while."""
    for name in unplaced:
        hopeless = _hopeless(change, change.models[name])
        if hopeless is not None:
            answer_all(change, name, hopeless)


def _hopeless(change: Change, model: Model) -> GatewayError | None:
    """Why waiting for a node that can hold ``model`` makes no sense; ``None``: it does."""
    if not could_ever_hold(change.policy.kinds, change.nodes.rows, need_of(model)):
        return _no_room(change, model)
    troubled = _only_in_trouble(change, need_of(model))
    return _no_blocks(change, model, troubled) if troubled else None


def record_failure(
    change: Change,
    model: str,
    reason: str,
    summary: str | None = None,
    *,
    after_ready: bool = False,
    on_board: bool = False,
) -> None:
    """Count a failed load, or an engine that died soon after it was ready, and refuse waiters who saw enough of them.

    ``summary``: of a reason that is not for everybody. ``on_board``: requests were, and may be the cause.
    Back-off: ``retry_first_s`` doubled with each in a row up to ``retry_max_s``; a first death after ready costs none,
    nor do those with requests on board before there were ``crashes_per_wait`` of them.
    """
    last = change.failures.rows.get(model)
    count = 1 + (last.count if last is not None and last.after_ready == after_ready else 0)
    policy = change.policy
    enough = policy.crashes_per_wait if on_board else policy.failures_per_wait
    doublings = min(count - (enough if on_board else 1 + after_ready), 30)
    delay = 0.0 if doublings < 0 else min(policy.retry_max_s, policy.retry_first_s * 2.0**doublings)
    failure = Failure(count, change.now, change.now + delay, reason, after_ready, summary or reason)
    change.failures.put(model, failure)
    if count >= enough:
        change.wished.drop(model)
        answer_all(change, model, _unavailable(model, failure, change.now))


def _unavailable(model: str, failure: Failure, now: float) -> ModelUnavailable:
    wait_s = max(1.0, failure.retry_at - now)
    return ModelUnavailable(
        f"The engine of model '{model}' failed {failure.count} times in a row, the last time: "
        f"{failure.summary.rstrip('.')}. It is tried again for requests that come after {wait_s:.0f} s.",
        retry_after_s=wait_s,
        state="failed",
        eta_s=None,
        detail=failure.reason,
    )


def _no_room(change: Change, model: Model) -> NoRoom:
    need = f"{model.gpus} GPUs with {model.memory_mib} MiB each" if model.gpus else f"{model.memory_mib} MiB"
    things: tuple[NodeKind | Node, ...] = (*change.policy.kinds, *change.nodes.rows.values())
    most = max((max(thing.gpu_mib, default=0) if model.gpus else thing.host_mib for thing in things), default=0)
    where = f"at most {max((len(t.gpu_mib) for t in things), default=0)} GPUs with {most}" if model.gpus else f"{most}"
    return NoRoom(
        f"The model '{model.name}' needs {need}; a node of this site has {where} MiB. "
        "Give it less memory in the catalog, or the site larger nodes.",
        retry_after_s=300.0,
        state="cold",
    )


def _only_in_trouble(change: Change, need: Need) -> dict[str, Trouble]:
    """The kinds that could hold ``need``, where no node here could and all are in lasting trouble; else none."""
    if not any(trouble.lasting for trouble in change.troubles.rows.values()):
        return {}
    able = {kind.name: kind for kind in change.policy.kinds if kind.max_nodes > 0 and holds(kind, need)}
    useless = withdrawn(change)
    for node in change.nodes.rows.values():
        coming = node.phase is NodePhase.PENDING and node.type in able and node.id not in useless
        if coming or holds(node, need):
            return {}
    found = {}
    for name in able:
        trouble = change.troubles.rows.get(name)
        if trouble is None or not trouble.lasting or change.now >= trouble.retry_at:
            return {}
        found[name] = trouble
    return found


def _no_blocks(change: Change, model: Model, troubled: Mapping[str, Trouble]) -> NoBlocks:
    wait_s = max(1.0, min(trouble.retry_at for trouble in troubled.values()) - change.now)
    said = " ".join(f"{words(kind, trouble)}." for kind, trouble in troubled.items())
    kinds = " or ".join(f"'gateway blocks retry {kind}'" for kind in troubled)
    return NoBlocks(
        f"The model '{model.name}' fits only on blocks that cannot be had. {said} An administrator who has put that "
        f"right runs {kinds}; by itself it is tried again in {wait_s:.0f} s.",
        retry_after_s=wait_s,
        state="cold",
    )


# --- what can be told ---
def model_state(fleet: Fleet, model: str) -> str:
    """``ready``, ``stalled``, ``loading``, ``failed``, ``queued``, ``draining`` or ``cold``: the first that is true.

    ``stalled``: its engines have work and make no progress. ``queued``: it is wanted, and waits for room or for a node.
    """
    engines = [fleet.engines[engine] for engine in fleet.model_engines.get(model, ())]
    up = [engine for engine in engines if engine.state is EngineState.READY and engine.route is RouteState.OPEN]
    if up:
        return "stalled" if all(map(stalled, up)) else "ready"
    if any(live(engine) for engine in engines):
        return "loading"
    if model in fleet.failures:
        return "failed"
    if model in fleet.queues or model in fleet.pinned or model in fleet.wished:
        return "queued"
    return "draining" if engines else "cold"


def eta_s(fleet: Fleet, model: str, now: float) -> float | None:
    """Expected seconds until ``model`` serves, if it were wanted now; ``None``: nobody knows.

    (1) it serves: 0; (2) it loads: what is left of its last load's time, at least 1; (3) back-off: its rest and a load;
    (4) there is free room: a load, after what loads or stops there now; (5) a node that could hold it was asked for:
    when that is expected, and a load; (6) a node here could hold it: a load; (7) a node must be had first: as long as
    the queue took lately, and a load.
    """
    engines = [fleet.engines[engine] for engine in fleet.model_engines.get(model, ())]
    if any(serving(engine) for engine in engines):  # (1)
        return 0.0
    load = fleet.load_s.get(model, fleet.policy.load_guess_s)
    loading = [engine for engine in engines if live(engine)]
    if loading:  # (2)
        return max(1.0, load - (now - min(engine.started for engine in loading)))
    failure = fleet.failures.get(model)
    if failure is not None and now < failure.retry_at:  # (3)
        return failure.retry_at - now + load
    entry = fleet.models.get(model)
    if entry is None:
        return None
    need = need_of(entry)
    here = [node for node in fleet.nodes.values() if stays(node) and holds(node, need)]
    if any(Room(node.free_host_mib, node.free_gpu_mib).devices(need) is not None for node in here):  # (4)
        other = beside.waits_for(fleet, need)
        return load if other is None else beside.wait_s(fleet, other, now) + load
    coming = next_node(fleet, need, now)
    if coming is not None:  # (5)
        return None if coming.in_s is None else coming.in_s + load
    if here:  # (6)
        return load
    asks = [ask_s(fleet, kind.name) for kind in fleet.policy.kinds if kind.max_nodes > 0 and holds(kind, need)]
    return min((seconds + load for seconds in asks if seconds is not None), default=None)  # (7)


def waiting_reason(fleet: Fleet, model: str, now: float, *, detail: bool = False) -> str | None:
    """Why a model waits: (1) one that is ``queued``, for another engine on a GPU or for a node that it needs; (2) any,
    while the state folder cannot be written; else ``None``.

    ``detail``: for administrators.
    """
    entry = fleet.models.get(model)
    said: str | None = None
    if entry is not None and model_state(fleet, model) == "queued":  # (1)
        said = _queued_for(fleet, need_of(entry), now, detail=detail)
    return "; ".join(filter(None, (said, fleet.storage))) or None  # (2)


def _queued_for(fleet: Fleet, need: Need, now: float, *, detail: bool) -> str | None:
    other = beside.waits_for(fleet, need)
    if other is not None:
        return beside.wait_words(other)
    coming = next_node(fleet, need, now)
    return why_none(fleet, need, now, detail=detail) if coming is None else coming.words
