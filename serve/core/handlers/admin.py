"""Administrators' commands: catalog, load, unload, pin, drain, retry, shutdown."""

from __future__ import annotations

import math

from gateway_plugin.catalog import Model
from gateway_plugin.errors import GoingDown, ModelNotFound, Unloaded
from gateway_plugin.phases import BlockPhase
from serve.core.effects import KillAgent
from serve.core.events import (
    BlockCancelAsked,
    CatalogChanged,
    GatewayCloses,
    LoadAsked,
    NodeDrainAsked,
    NodeTypeRetryAsked,
    PinChanged,
    StorageSeen,
    UnloadAsked,
)
from serve.core.spread import Spread
from serve.core.state import NodePhase, live
from serve.core.transaction import Transaction
from serve.core.transitions import answer_all, begin_stop, drain_node, lose


def catalog_changed(tx: Transaction, event: CatalogChanged) -> None:
    """(1) engines of models that are gone or changed are drained and stopped, those that serve changed adapters already
    are not; (2) waiters of gone ones are
    refused; (3) their slots, failures and demand are dropped; (4) pins follow the catalog where it changed;
    (5) what is known of a model's load is kept, below its ``replicas_max``.
    """
    before = tx.models
    after = {model.name: model for model in event.models}
    tx.models = after
    tx.names = {name: model.name for model in event.models for name in model.names}
    changed = {name for name, model in after.items() if name in before and model != before[name]}
    gone = set(before) - set(after)
    for name in sorted(gone | {n for n in changed if _other_engine(before[n], after[n])}):
        same_weights = name not in gone and adapters_only(before[name], after[name])
        for engine in tx.engines_of(name):  # (1)
            if not (same_weights and engine.id in event.adapted):
                begin_stop(tx, engine, "catalog")
        tx.failures.drop(name)
        if not same_weights:
            tx.weights.drop(name)
        for learned in () if same_weights else (tx.load_s, tx.wake_s):
            learned.drop(name)
        tx.sleep_doubts.drop(name)
    for name in sorted(gone):
        answer_all(tx, name, ModelNotFound(name, tuple(after)))  # (2)
        tx.slots.drop(name)  # (3)
        tx.asked.drop(name)
    for table in (tx.habits, tx.follows, tx.load_s, tx.wake_s, tx.drain_s):
        for name in table.rows.keys() - after.keys():  # (3) an earlier controller may have known them
            table.drop(name)
    tx.pinned = frozenset(  # (4)
        name
        for name, model in after.items()
        if (model.pinned if name not in before or model.pinned != before[name].pinned else name in tx.pinned)
    )
    for name in tx.requested_until.rows.keys() - after.keys():
        tx.requested_until.drop(name)
    for name, model in after.items():  # (5)
        spread = tx.spreads.rows.get(name)
        if model.replicas_max > 1 and spread is None:
            tx.spreads.put(name, Spread(set_at=tx.now))
        elif spread is not None and spread.wanted > model.replicas_max:
            tx.spreads.put(name, Spread(model.replicas_max, tx.now, model.replicas_max, tx.now))
    for name in tx.spreads.rows.keys() - after.keys():
        tx.spreads.drop(name)
    tx.slots_changed = True


_HOW_LONG = {"pinned", "keep_alive_s", "min_residency_s", "load_timeout_s", "drain_timeout_s"}
_HOW_LONG |= {"replicas_max", "target_in_flight", "group"}
"""Keys of an entry that its engines do not depend on."""


def _other_engine(before: Model, after: Model) -> bool:
    """Whether an engine started for ``before`` does not fit the entry ``after``."""
    return bool(_differences(before, after))


def adapters_only(before: Model, after: Model) -> bool:
    """Whether an engine started for ``before`` fits ``after`` once it serves that one's adapters: both take some."""
    taken = before.adapters is not None and after.adapters is not None
    return taken and _differences(before, after) == {"adapters"}


def _differences(before: Model, after: Model) -> set[str]:
    """Keys that an engine depends on. One whose memory was worked out keeps it until it is loaded again."""
    same = set(_HOW_LONG)
    if before.predicted_gib is not None and after.predicted_gib is not None:
        same |= {"memory_gib", "predicted_gib"}
    old, new = vars(before), vars(after)
    return {key for key in old if old[key] != new[key]} - same


def load_asked(tx: Transaction, event: LoadAsked) -> None:
    """Demand until ready; a back-off is cleared."""
    name = tx.names.get(event.model)
    if name is not None:
        tx.failures.drop(name)
        tx.requested_until.put(name, math.inf)


def unload_asked(tx: Transaction, event: UnloadAsked) -> None:
    """Waiters are refused, pin and demand dropped, every engine drained and stopped; a new request loads it again."""
    name = tx.names.get(event.model)
    if name is None:
        return
    answer_all(
        tx,
        name,
        Unloaded(
            f"The model '{name}' was unloaded by an administrator while the request waited. Ask again to load it.",
            retry_after_s=5.0,
            state="draining" if any(map(live, tx.engines_of(name))) else "cold",
        ),
    )
    tx.pinned -= {name}
    tx.requested_until.drop(name)
    if name in tx.spreads.rows:
        tx.spreads.put(name, Spread(set_at=tx.now))
    for engine in tx.engines_of(name):
        begin_stop(tx, engine, "unloaded")


def gateway_closes(tx: Transaction, event: GatewayCloses) -> None:
    """Every waiter is refused and all demand dropped: no further block is requested."""
    for model in sorted(tx.queues.rows):
        answer_all(tx, model, GoingDown())
    for model in tuple(tx.requested_until.rows):
        tx.requested_until.drop(model)


def pin_changed(tx: Transaction, event: PinChanged) -> None:
    name = tx.names.get(event.model)
    if name is not None:
        tx.pinned = tx.pinned | {name} if event.pinned else tx.pinned - {name}


def retry_asked(tx: Transaction, event: NodeTypeRetryAsked) -> None:
    """``gateway blocks retry``: earlier failures of its blocks do not count."""
    tx.reset_at.put(event.type, tx.now)
    tx.backoffs.drop(event.type)
    tx.agent_failures.drop(event.type)


def storage_seen(tx: Transaction, event: StorageSeen) -> None:
    """Serving goes on; waiters are shown the reason, which may be why they wait."""
    tx.storage = event.backoff


def node_drain_asked(tx: Transaction, event: NodeDrainAsked) -> None:
    """``gateway blocks drain``."""
    node = tx.nodes.rows.get(event.node)
    if node is not None:
        drain_node(tx, node)


def block_cancel_asked(tx: Transaction, event: BlockCancelAsked) -> None:
    """Its job is being ended; here the node is removed, so that it gets no more requests and Ray asks for no other.

    (1) its node joined: its routes close and its agent is killed, and its engines with it, even with requests in
    flight; (2) no node of it yet: of the pending ones of its type, any of which it may have become, the one unneeded
    for longest is removed, else the youngest (one that has not reported after a restart is no pending one);
    (3) neither, or cancelled before: nothing.
    """
    node = next((node for node in tx.nodes.rows.values() if node.block == event.block), None)
    block = tx.blocks.get(event.block)
    if node is None and block is not None and (block.phase.queued or block.phase is BlockPhase.RUNNING):  # (2)
        pending = [
            other
            for other in tx.nodes.rows.values()
            if other.phase is NodePhase.PENDING and other.type == block.type and other.id not in tx.unsettled
        ]
        unneeded = [other for other in pending if other.idle_since is not None]
        youngest = max(pending, key=lambda other: (other.since, other.id), default=None)
        node = min(unneeded, key=lambda other: (other.idle_since, other.id), default=youngest)
    if node is not None:  # (1)
        lose(tx, node)
        tx.emit(KillAgent(node.id))
