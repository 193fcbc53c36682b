"""``step``: one event into the fleet, and the effects that follow. Pure; ``now``: seconds of the controller's clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from serve.core import events
from serve.core.effects import (
    Answer,
    CloseRoute,
    CreateAgent,
    DrainRoute,
    Effect,
    FetchWeights,
    KillAgent,
    OpenRoute,
    SleepEngine,
    StartEngine,
    StopEngine,
    SyncSlots,
    WakeEngine,
)
from serve.core.events import Event
from serve.core.handlers import admin, blocks, engines, nodes, recovery, requests, routes, weights
from serve.core.learned import Learned
from serve.core.policies import (
    apart,
    backoff,
    commands,
    eviction,
    expiry,
    fetches,
    idle,
    pressure,
    replicas,
    scale_down,
    scale_up,
)
from serve.core.policies.answers import answer_ready, refuse_hopeless
from serve.core.policies.handover import hand_over
from serve.core.policies.placement import place_wanted
from serve.core.policy import Policy
from serve.core.state import Fleet
from serve.core.transaction import Policies, Transaction

_HANDLERS: dict[type, Callable[[Transaction, Any], None]] = {
    events.Started: recovery.started,
    events.CatalogChanged: admin.catalog_changed,
    events.NodeJoined: nodes.node_joined,
    events.NodeGone: nodes.node_gone,
    events.NodeFailed: nodes.node_failed,
    events.NodeDrainAsked: admin.node_drain_asked,
    events.BlockCancelAsked: admin.block_cancel_asked,
    events.BlocksSeen: blocks.blocks_seen,
    events.NodeLeaves: blocks.node_leaves,
    events.NodeTypeRetryAsked: admin.retry_asked,
    events.EngineListening: engines.engine_listening,
    events.EngineReady: engines.engine_ready,
    events.EngineAsleep: engines.engine_asleep,
    events.EngineAwake: engines.engine_awake,
    events.EngineGrew: engines.engine_grew,
    events.EngineStalled: engines.engine_stalled,
    events.EngineMoves: engines.engine_moves,
    events.EngineExited: engines.engine_exited,
    events.RouteOpened: routes.route_opened,
    events.RouteRefused: routes.route_refused,
    events.RouteDrained: routes.route_drained,
    events.RouteClosed: routes.route_closed,
    events.EdgeSeen: routes.edge_seen,
    events.Acquire: requests.acquire,
    events.WaiterLeft: requests.waiter_left,
    events.GatewayCloses: admin.gateway_closes,
    events.ModelAnswered: requests.model_answered,
    events.SuspectsKept: requests.suspects_kept,
    events.LoadAsked: admin.load_asked,
    events.UnloadAsked: admin.unload_asked,
    events.PinChanged: admin.pin_changed,
    events.StorageSeen: admin.storage_seen,
    events.WeightsMissing: weights.weights_missing,
    events.WeightsFetching: weights.weights_fetching,
    events.WeightsThere: weights.weights_there,
    events.Tick: lambda tx, event: requests.answer_overdue(tx),
}

_RANK = {
    effect: rank
    for rank, effect in enumerate(
        (
            *(DrainRoute, Answer, StopEngine, CloseRoute, SleepEngine, SyncSlots, StartEngine, WakeEngine, OpenRoute),
            *(CreateAgent, KillAgent, FetchWeights),
        )
    )
}
"""Order of one step's effects: a slot has its key before an engine is started for it or a route opened in it."""

_OF_ONE_WAITER = (events.Acquire, events.WaiterLeft)
_OF_BLOCKS = (events.BlocksSeen, events.NodeJoined)


def _scale(tx: Transaction, unplaced: tuple[str, ...]) -> None:
    scale_down.shrink(tx, *scale_up.grow(tx, unplaced))


DEFAULT = Policies(
    wanted_replicas=replicas.wanted_replicas,
    placement=place_wanted,
    order=pressure.order,
    candidates=pressure.candidates,
    limit=pressure.limit,
    summed=True,
    price=pressure.price,
    held_s=pressure.held_s,
    sleep_worth=pressure.sleep_worth,
    blocked_s=pressure.blocked_s,
    because=pressure.because,
    scaling=_scale,
)
"""The gateway's own policies."""

LRU = replace(
    DEFAULT,
    order=eviction.oldest_first,
    candidates=eviction.least_recently_used,
    limit=eviction.no_limit,
    summed=False,
    price=eviction.price,
    held_s=eviction.held_s,
    sleep_worth=eviction.used_last,
    blocked_s=eviction.not_weighed,
    because=eviction.recency,
)
"""Least recently used of the idle engines, in the order of the oldest waiters: for comparison."""

POLICIES = {"pressure": DEFAULT, "lru": LRU}
"""By the name that a site chooses (``Policy.switching``)."""


def initial(policy: Policy, learned: Learned | None = None) -> Fleet:
    """The initial, empty fleet; ``CatalogChanged`` and ``Started`` come first. ``learned``: by the one before."""
    return Fleet(policy, **vars(learned or Learned()))


def step(fleet: Fleet, event: Event, now: float, policies: Policies | None = None) -> tuple[Fleet, tuple[Effect, ...]]:
    """The fleet after ``event``, and the effects to carry out, in this order. ``policies``: instead of those that the
    fleet's own ``Policy.switching`` names, e.g. in a simulation.

    (1) a request for a model that serves: go; (2) the handler records the fact, and a new ledger determines which
    node types back off; (3) a waiter more or less for a model that has others waiting changes nothing else; (4) before
    the fleet has settled nothing is started or stopped, but waiters of a model that serves are released; (5) the
    passes: expiry, hand-over, idle engines, replicas, answers, fetches, placement, scaling, and the commands that carry
    all of it out.
    """
    if type(event) is events.Acquire:
        granted = requests.go_at_once(fleet, event, now)  # (1)
        if granted is not None:
            return granted
    tx = Transaction(fleet, now, policies or POLICIES[fleet.policy.switching])
    _HANDLERS[type(event)](tx, event)  # (2)
    if isinstance(event, _OF_BLOCKS):
        backoff.review_backoffs(tx)
    if _changes_nothing_else(fleet, tx, event):  # (3)
        return tx.commit(), tuple(tx.effects)
    if not tx.settled:
        recovery.settle(tx)
    if not tx.settled:
        answer_ready(tx)  # (4)
    else:
        _follow(tx)  # (5)
    tx.effects.sort(key=lambda effect: _RANK[type(effect)])
    return tx.commit(), tuple(tx.effects)


def _changes_nothing_else(fleet: Fleet, tx: Transaction, event: Event) -> bool:
    if not fleet.settled or not isinstance(event, _OF_ONE_WAITER):
        return False
    return tx.queues.rows.keys() == fleet.queues.keys() and tx.engines.rows is fleet.engines


def _follow(tx: Transaction) -> None:
    expiry.review(tx)
    handed_over = hand_over(tx)
    idle.clear_crashes(tx)
    idle.review(tx)
    replicas.review(tx)
    apart.review_apart(tx)
    answer_ready(tx)
    fetches.review_fetches(tx)
    unplaced = tx.policies.placement(tx, (*handed_over, *replicas.short(tx)))
    if unplaced:
        expiry.release_ending(tx, unplaced)
    refuse_hopeless(tx, unplaced)
    tx.policies.scaling(tx, unplaced)
    commands.reconcile(tx)
