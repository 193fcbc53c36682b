"""``step``: one event into the fleet, and what is to be done about it. Pure; ``now`` is wall-clock seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve.core import apart, blocks, engines, events, leaving, nodes, routes, stalls, troubles, waiting, wishes
from serve.core.change import Change
from serve.core.effects import (
    Answer,
    CloseRoute,
    CreateAgent,
    DrainRoute,
    Effect,
    KillAgent,
    OpenRoute,
    StartEngine,
    StopEngine,
    SyncSlots,
)
from serve.core.events import Event
from serve.core.fleet import Fleet, Policy
from serve.core.growth import grow_and_shrink
from serve.core.placement import place_wanted
from serve.core.succession import hand_over

_HANDLERS: dict[type, Callable[[Change, Any], None]] = {
    events.Started: nodes.started,
    events.CatalogChanged: wishes.catalog_changed,
    events.NodeJoined: nodes.node_joined,
    events.NodeGone: nodes.node_gone,
    events.NodeFailed: nodes.node_failed,
    events.NodeDrainAsked: nodes.node_drain_asked,
    events.BlockCancelAsked: nodes.block_cancel_asked,
    events.BlocksSeen: blocks.blocks_seen,
    events.NodeLeaves: blocks.node_leaves,
    events.KindRetryAsked: troubles.retry_asked,
    events.EngineListening: engines.engine_listening,
    events.EngineReady: engines.engine_ready,
    events.EngineStalled: stalls.engine_stalled,
    events.EngineMoves: stalls.engine_moves,
    events.EngineExited: engines.engine_exited,
    events.RouteOpened: routes.route_opened,
    events.RouteRefused: routes.route_refused,
    events.RouteDrained: routes.route_drained,
    events.RouteClosed: routes.route_closed,
    events.EdgeSeen: routes.edge_seen,
    events.Acquire: waiting.acquire,
    events.WaiterLeft: waiting.waiter_left,
    events.GatewayCloses: wishes.gateway_closes,
    events.ModelAnswered: engines.model_answered,
    events.SuspectsKept: apart.suspects_kept,
    events.LoadAsked: wishes.load_asked,
    events.UnloadAsked: wishes.unload_asked,
    events.PinChanged: wishes.pin_changed,
    events.StorageSeen: nodes.storage_seen,
    events.Tick: lambda change, event: waiting.answer_overdue(change),
}

_RANK = {
    effect: rank
    for rank, effect in enumerate(
        (DrainRoute, Answer, StopEngine, CloseRoute, SyncSlots, StartEngine, OpenRoute, CreateAgent, KillAgent)
    )
}
"""Order of one step's effects: a slot has its key before an engine is started for it or a route opened in it."""

_NOBODY_ELSE = (events.Acquire, events.WaiterLeft)
"""Events that concern one waiter."""


def initial(policy: Policy) -> Fleet:
    """A fleet that knows nothing yet; ``CatalogChanged`` and ``Started`` come first."""
    return Fleet(policy)


def step(fleet: Fleet, event: Event, now: float) -> tuple[Fleet, tuple[Effect, ...]]:
    """The fleet after ``event``, and what is to be done, in this order.

    (1) a request for a model that serves: go; (2) the handler states the facts; (3) a waiter more or less for a model
    that has others waiting changes nothing else; (4) before the fleet has settled nothing is started or stopped, though
    waiters of a model that serves are told to go; (5) what follows: time's reviews, answers, placement, growth, and the
    commands that carry all of it out.
    """
    if type(event) is events.Acquire:
        quick = waiting.go_at_once(fleet, event, now)  # (1)
        if quick is not None:
            return quick
    change = Change(fleet, now)
    _HANDLERS[type(event)](change, event)  # (2)
    if _changes_nothing_else(fleet, change, event):  # (3)
        return change.commit(), tuple(change.effects)
    if not change.settled:
        nodes.settle(change)
    if not change.settled:
        waiting.answer_ready(change)  # (4)
    else:
        _follow(change)  # (5)
    change.effects.sort(key=lambda effect: _RANK[type(effect)])
    return change.commit(), tuple(change.effects)


def _changes_nothing_else(fleet: Fleet, change: Change, event: Event) -> bool:
    if not fleet.settled or not isinstance(event, _NOBODY_ELSE):
        return False
    return change.queues.rows.keys() == fleet.queues.keys() and change.engines.rows is fleet.engines


def _follow(change: Change) -> None:
    leaving.review(change)
    handed_over = hand_over(change)
    engines.forgive(change)
    engines.review(change)
    apart.review_apart(change)
    waiting.answer_ready(change)
    unplaced = place_wanted(change, handed_over)
    if unplaced:
        leaving.let_go(change, unplaced)
    waiting.refuse_hopeless(change, unplaced)
    grow_and_shrink(change, unplaced)
    routes.reconcile(change)
