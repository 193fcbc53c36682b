"""Recovery of the fleet when a controller starts."""

from __future__ import annotations

from dataclasses import replace

from gateway_plugin.errors import ModelNotFound
from serve.core.effects import Answer
from serve.core.events import FoundServer, Started
from serve.core.policy import APART_S
from serve.core.state import ClosingRoute, Node, NodePhase
from serve.core.transaction import Transaction
from serve.core.transitions import keep_apart


def kind_of(node: str) -> str:
    """The type in a node's id (``TYPE-EPOCH-SERIAL``; a type's name has no dash)."""
    return node.split("-", 1)[0]


# --- after a restart ---
def started(tx: Transaction, event: Started) -> None:
    """A controller's life begins; the catalog (``CatalogChanged``) came before. The rest is reported again: slots
    and servers by this event, nodes and engines by a ``NodeJoined`` of each node named here."""
    tx.epoch = event.epoch
    tx.settled = False
    tx.started_at = tx.now
    tx.found = event.servers
    tx.unsettled = frozenset(event.nodes)
    tx.pinned |= event.pinned & frozenset(tx.models)
    for engine in list(tx.engines.rows.values()):
        tx.drop_engine(engine)
    for table in (tx.nodes, tx.closing, tx.slots, tx.apart):
        for key in list(table.rows):
            table.drop(key)
    for node in sorted(event.nodes):
        tx.nodes.put(node, Node(node, kind_of(node), NodePhase.PENDING, since=tx.now))
    taken: set[int] = set()
    for name, slot in sorted(event.slots.items()):
        if name in tx.models and slot not in taken and slot < tx.policy.slots:
            tx.slots.put(name, slot)
            taken.add(slot)
    for name in event.apart & tx.models.keys():
        keep_apart(tx, name, APART_S)


def settle(tx: Transaction) -> None:
    """The controller begins to act: (1) every node found has reported, or ``settle_s`` has passed; (2) servers without
    an engine are closed; (3) waiters that came before the catalog get their model."""
    late = tx.now >= tx.started_at + tx.policy.settle_s
    if tx.epoch == 0 or (tx.unsettled and not late):  # (1)
        return
    tx.settled = True
    tx.unsettled = frozenset()
    tx.slots_changed = True  # once, so that the edge equals the fleet
    for server in tx.found:  # (2)
        name = stray(server)
        tx.closing.put(name, ClosingRoute(name, server.slot, server.server, since=tx.now, pending=False))
    tx.found = ()
    resolve_names(tx)  # (3)


def stray(server: FoundServer) -> str:
    """The engine id under which a server without an engine is closed."""
    return f"unknown-slot{server.slot}-e{server.server}"


def resolve_names(tx: Transaction) -> None:
    """The catalog is known: waiters that came before get their model, or ``ModelNotFound``."""
    for waiter in list(tx.waiters.rows.values()):
        name = tx.names.get(waiter.model)
        if name == waiter.model:
            continue
        tx.drop_waiter(waiter.ticket)
        if name is None:
            tx.emit(Answer(waiter.ticket, ModelNotFound(waiter.model, tuple(tx.models))))
        else:
            tx.add_waiter(replace(waiter, model=name))
