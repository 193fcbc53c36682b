"""Requests: waiters, deadlines, and the ingress's reports of requests that killed engines."""

from __future__ import annotations

from gateway_plugin.errors import DeadlineTooEarly, ModelNotFound, ModelQueueFull, WaitDeadline
from serve.core.asking import note_caller
from serve.core.effects import Answer, Effect
from serve.core.events import Acquire, ModelAnswered, SuspectsKept, WaiterLeft
from serve.core.forecast import Forecast, eta_s, model_state, waiting_reason
from serve.core.frozen import replace
from serve.core.policy import APART_S, GRANT_STEP_S
from serve.core.room import need_of
from serve.core.shares import positions
from serve.core.state import Fleet, Waiter, live, serving
from serve.core.supply import why_hopeless, without_weights
from serve.core.table import Rows
from serve.core.transaction import Transaction
from serve.core.transitions import keep_apart, suspect_route, unavailable


def go_at_once(fleet: Fleet, event: Acquire, now: float) -> tuple[Fleet, tuple[Effect, ...]] | None:
    """The fast path for a model that serves: no settling, mostly no change. ``None``: not applicable."""
    model = fleet.names.get(event.model)
    if model is None or event.not_routed or event.ticket in fleet.waiters:
        return None
    up = [one for name in fleet.model_engines.get(model, ()) if serving(one := fleet.engines[name])]
    if not up:
        return None
    answer = (Answer(event.ticket),)
    if now < up[0].granted_at + GRANT_STEP_S:
        return fleet, answer
    engines = Rows.of(fleet.engines)
    engines |= {engine.id: replace(engine, granted_at=now) for engine in up}
    return replace(fleet, engines=engines), answer


def acquire(tx: Transaction, event: Acquire) -> None:
    """One request for a model that does not serve (``go_at_once`` has handled those that do).

    (1) it waits already; (2) unknown model (before the catalog is known: it waits); (3) it was released and the
    edge had no usable server; (4) no node, present or available soon, could hold the model; (5) its loads failed too
    often and the back-off is not over, or its weights are not on disk and nothing fetches them; (6) too many wait;
    (7) it does not wait, or its own deadline cannot be met: it is answered at once with the model's state, and nothing
    is done for it; (8) wait.
    """
    if event.ticket in tx.waiters.rows:  # (1)
        return
    name = tx.names.get(event.model)
    if name is None and (tx.settled or tx.models):  # (2)
        tx.emit(Answer(event.ticket, ModelNotFound(event.model, tuple(tx.models))))
        return
    if name is not None and event.not_routed:  # (3)
        suspect_route(tx, name)
    model = tx.models.get(name or "")
    failure = tx.failures.rows.get(name or "")
    if model is not None and tx.settled and not any(map(live, tx.engines_of(model.name))):
        hopeless = why_hopeless(tx, model)
        if hopeless is not None:  # (4)
            tx.emit(Answer(event.ticket, hopeless))
            return
        if failure is not None and failure.count >= tx.policy.failures_per_wait and tx.now < failure.retry_at:
            tx.emit(Answer(event.ticket, unavailable(model.name, failure, tx.now)))  # (5)
            return
        weights = tx.weights.rows.get(model.name)
        if weights is not None and not weights.may_fetch and not tx.engines_of(model.name):
            tx.emit(Answer(event.ticket, without_weights(model.name, weights)))
            return
    if len(tx.waiters.rows) >= tx.policy.waiting_max:  # (6)
        tx.emit(Answer(event.ticket, ModelQueueFull(event.model, tx.policy.waiting_max)))
        return
    wait_s = event.wait_s if event.deadline_s is None else min(event.wait_s, event.deadline_s)
    waiter = Waiter(event.ticket, name or event.model, tx.now, tx.now + wait_s, event.unattended, event.requester)
    tx.add_waiter(waiter)
    if name is not None and not event.not_routed:
        tx.note_use(name, tx.now, paused=True)
        note_caller(tx, waiter)
    if wait_s <= 0:  # (7)
        answer_overdue(tx)
    elif event.deadline_s is not None and tx.settled:
        _refuse_too_late(tx, waiter, event.deadline_s)


def _refuse_too_late(tx: Transaction, waiter: Waiter, deadline_s: float) -> None:
    """Refuse a waiter whose model is expected after its client's deadline."""
    fleet = tx.commit()
    eta = eta_s(fleet, waiter.model, tx.now)
    if eta is None or eta <= deadline_s:
        return
    state, reason = model_state(fleet, waiter.model), waiting_reason(fleet, waiter.model, tx.now)
    position = positions(tx.waiting(waiter.model))[waiter.ticket]
    tx.drop_waiter(waiter.ticket)
    error = DeadlineTooEarly(
        f"The model '{waiter.model}' is expected to be ready in {eta:.0f} s, after the request's deadline of "
        f"{deadline_s:g} s (x-gateway-deadline-s). Try again later, or wait longer.",
        retry_after_s=max(1.0, eta),
        state=state,
        eta_s=eta,
        reason=reason,
        position=position,
    )
    tx.emit(Answer(waiter.ticket, error))


def waiter_left(tx: Transaction, event: WaiterLeft) -> None:
    if event.ticket in tx.waiters.rows:
        tx.drop_waiter(event.ticket)


def answer_overdue(tx: Transaction) -> None:
    """Refuse waiters whose deadline has passed, with the state of their model.

    If the model waits for a block, its demand is kept until shortly after Retry-After; otherwise the pending job
    would be cancelled and lose its queue position. (For clients that do not wait at all, one model at a time.)
    """
    for model in [model for model, until in tx.requested_until.rows.items() if tx.now >= until]:
        tx.requested_until.drop(model)
    fleet: Fleet | None = None
    place: dict[str, int] = {}
    """Of every waiter of the models that were looked at."""
    for waiter in list(tx.waiters.rows.values()):
        if tx.now >= waiter.deadline:
            fleet = fleet or tx.commit()
            if waiter.ticket not in place:
                place |= positions(tx.waiting(waiter.model))
            state = model_state(fleet, waiter.model)
            eta = eta_s(fleet, waiter.model, tx.now)
            reason = waiting_reason(fleet, waiter.model, tx.now)
            detail = waiting_reason(fleet, waiter.model, tx.now, detail=True)
            in_a_hurry = waiter.unattended or waiter.deadline <= waiter.since
            if eta is not None and state == "queued" and not (in_a_hurry and tx.requested_until.rows):
                _keep_demand(tx, fleet, waiter.model, eta)
            tx.drop_waiter(waiter.ticket)
            waited = tx.now - waiter.since
            why = f"state: {state}" if reason is None else f"state: {state}; {reason}"
            error = WaitDeadline(
                f"The model '{waiter.model}' was not ready after {waited:.0f} s ({why}). Try again later.",
                retry_after_s=5.0 if eta is None else max(1.0, eta),
                state=state,
                eta_s=eta,
                reason=reason,
                detail=None if detail == reason else detail,
                position=place[waiter.ticket],
            )
            tx.emit(Answer(waiter.ticket, error))


def _keep_demand(tx: Transaction, fleet: Fleet, model: str, eta_s: float) -> None:
    if Forecast(fleet, tx.now).next_node(need_of(tx.models[model])) is None:
        return
    policy = tx.policy
    until = tx.now + min(eta_s + policy.pending_idle_s, policy.demand_kept_max_s)
    tx.requested_until.put(model, max(until, tx.requested_until.rows.get(model, until)))


def suspects_kept(tx: Transaction, event: SuspectsKept) -> None:
    """The ingress has suspects, or remembers a culprit."""
    model = tx.names.get(event.model, event.model)
    if model in tx.models:
        keep_apart(tx, model, APART_S)


def model_answered(tx: Transaction, event: ModelAnswered) -> None:
    """Its engines answer: the crashes' cause is not the model itself."""
    model = tx.names.get(event.model, event.model)
    failure = tx.failures.rows.get(model)
    if failure is not None and failure.after_ready:
        tx.failures.drop(model)
