"""Nodes and their agents: joined, gone, adopted again, given back; and how the fleet is rebuilt after a restart."""

from __future__ import annotations

from dataclasses import replace

from serve.core.apart import APART_S, keep_apart
from serve.core.blocks import know_block
from serve.core.change import Change
from serve.core.effects import CreateAgent, KillAgent
from serve.core.engines import forget, made_ready
from serve.core.events import (
    BlockCancelAsked,
    FoundEngine,
    FoundServer,
    NodeDrainAsked,
    NodeFailed,
    NodeGone,
    NodeJoined,
    Started,
    StorageSeen,
)
from serve.core.fleet import ClosingRoute, Engine, EngineState, Failure, Node, NodePhase, RouteState
from serve.core.routes import retire
from serve.core.troubles import judge
from serve.core.waiting import resolve_names


def kind_of(node: str) -> str:
    """The type in a node's id (``TYPE-EPOCH-SERIAL``; a type's name has no dash)."""
    return node.split("-", 1)[0]


def node_joined(change: Change, event: NodeJoined) -> None:
    """An agent says what it has: (1) an unknown node without engines was given back before it came: it ends, and its
    fresh block is for who waits for one;
    (2) engines of ours that it does not have are gone; (3) those it has are compared; (4) those unknown are adopted."""
    node = change.nodes.rows.get(event.node)
    if node is None:
        if not event.engines:  # (1)
            change.emit(KillAgent(event.node, block_goes=False))
            return
        node = Node(event.node, event.type, NodePhase.UP, since=change.now)
    found = {engine.id: engine for engine in event.engines}
    for engine in [change.engines.rows[known] for known in node.engines]:
        if engine.id not in found or found[engine.id].generation != engine.generation:  # (2)
            forget(change, engine)
    left = change.nodes.rows.get(node.id, node).engines
    phase = NodePhase.LEAVING if node.drain_asked else NodePhase.UP
    fresh = node.phase is NodePhase.PENDING and node.id not in change.unsettled
    joined = replace(
        node,
        type=event.type,
        phase=phase,
        since=node.since if node.phase is phase else change.now,
        address=event.address,
        block=event.block,
        idle_since=None if left else node.idle_since if node.phase is phase else change.now,
        engines=left,
        joined_at=change.now if fresh else node.joined_at,
    )
    change.describe_node(joined, event.host_mib, event.gpu_mib)
    know_block(change, change.nodes.rows[joined.id])
    for one in event.engines:
        known = change.engines.rows.get(one.id)
        if known is None:  # (4)
            _adopt(change, node.id, one)
        elif known.state is EngineState.LOADING:  # (3)
            known = change.set_engine(known, address=one.address)
            if one.ready:
                made_ready(change, known, one.address, one.loaded_s)
        elif known.state is EngineState.STOPPING:
            change.set_engine(known, stop_sent=False)
    if joined.drain_asked:
        _retire_all(change, joined.id, "node-ends" if joined.ending else "node-leaving")
    change.unsettled -= {event.node}
    change.kind_failures.drop(event.type)
    change.joined_blocks |= {event.block}
    judge(change)


def _adopt(change: Change, node: str, found: FoundEngine) -> None:
    """An engine process that the fleet does not know. What the edge has open for it stays open.

    (1) ready, its server open: nothing is done to it; (2) ready, its server draining: the drain goes on or is taken
    back; (3) ready, no server: its route is opened; (4) not ready: it loads; (5) its model is unknown, its key is (no
    slot), its memory is not there, or its model loads already: it is let go.
    """
    slot = change.slots.rows.get(found.model)
    server = next((s for s in change.found if s.address == found.address and slot in (None, s.slot)), None)
    if server is not None:
        change.found = tuple(other for other in change.found if other is not server)
        slot = server.slot
    used = server is not None and server.idle_s >= 0
    draining = server is not None and server.draining
    state = EngineState.LOADING  # (4)
    if found.ready or server is not None:
        state = EngineState.DRAINING if draining else EngineState.READY  # (1), (2), (3)
    engine = Engine(
        id=found.id,
        model=found.model,
        node=node,
        gpus=found.gpus,
        memory_mib=found.memory_mib,
        generation=found.generation,
        state=state,
        since=change.now,
        started=found.started,
        loaded_s=found.loaded_s,
        address=found.address,
        route=RouteState.NONE if server is None else RouteState.DRAINING if draining else RouteState.OPEN,
        server=None if server is None else server.server,
        up=server is not None and server.up,
        in_flight=0 if server is None else server.in_flight,
        last_used=change.now - server.idle_s if server is not None and used else 0.0,
        stop_reason="evicted" if draining else "",
        slot=slot,
        drained=draining,
        fresh_from=change.now,
        answered_at=change.now,
    )
    loading_twice = state is EngineState.LOADING and any(
        other.state is EngineState.LOADING for other in change.engines_of(found.model)
    )
    change.add_engine(engine)
    change.serial = max(change.serial, found.generation)
    if found.loaded_s is not None:
        change.load_s.put(found.model, found.loaded_s)
    host = change.nodes.rows[node]
    if found.model not in change.models:  # (5)
        retire(change, engine, "catalog")
    elif slot is None:
        retire(change, engine, "no-slot")
    elif loading_twice:
        retire(change, engine, "abandoned")
    elif min((host.free_host_mib, *host.free_gpu_mib)) < 0 or any(gpu >= len(host.gpu_mib) for gpu in found.gpus):
        retire(change, engine, "over-committed")


def node_gone(change: Change, event: NodeGone) -> None:
    """(1) unknown: ignored; (2) only its agent died: ask for another there, its engines run on; (3) a second agent died
    before it reported, or the node is gone: its engines are gone, their routes are closed, waiters wait on."""
    node = change.nodes.rows.get(event.node)
    if node is None:  # (1)
        return
    if event.node_alive and node.phase in (NodePhase.UP, NodePhase.LEAVING):  # (2)
        change.nodes.put(node.id, replace(node, phase=NodePhase.ORPHANED, since=change.now))
        change.emit(CreateAgent(node.id, node.type, node.block))
        return
    lose(change, node)  # (3)


def node_failed(change: Change, event: NodeFailed) -> None:
    """No agent could be made: the next of that type is asked for after a back-off."""
    node = change.nodes.rows.get(event.node)
    if node is None:
        return
    last = change.kind_failures.rows.get(node.type)
    count = 1 + (last.count if last is not None else 0)
    delay = min(change.policy.retry_max_s, change.policy.retry_first_s * 2.0 ** min(count - 1, 30))
    change.kind_failures.put(node.type, Failure(count, change.now, change.now + delay, event.reason))
    lose(change, node)


def lose(change: Change, node: Node) -> None:
    """The node is gone, and its engines with it."""
    for engine in node.engines:
        forget(change, change.engines.rows[engine])
    change.nodes.drop(node.id)
    change.unsettled -= {node.id}


def node_drain_asked(change: Change, event: NodeDrainAsked) -> None:
    """Its engines go behind drained routes; ``growth`` gives it back when it is empty."""
    node = change.nodes.rows.get(event.node)
    if node is None:
        return
    phase = NodePhase.LEAVING if node.phase is NodePhase.UP else node.phase
    change.nodes.put(node.id, replace(node, phase=phase, drain_asked=True))
    _retire_all(change, node.id, "node-leaving")


def block_cancel_asked(change: Change, event: BlockCancelAsked) -> None:
    """Its job is being ended; here the node goes, so that nothing more is sent there and Ray asks for no other.

    (1) its node joined: its routes close and its agent is killed, and its engines with it, whatever is in flight;
    (2) no node of it yet: of the pending ones of its type, any of which it may have become, the one that nobody has
    needed for longest goes, else the youngest (one that has not reported after a restart is no pending one);
    (3) neither, or told before: nothing.
    """
    node = next((node for node in change.nodes.rows.values() if node.block == event.block), None)
    block = change.blocks.get(event.block)
    if node is None and block is not None and block.phase in ("submitting", "pending", "running"):  # (2)
        pending = [
            other
            for other in change.nodes.rows.values()
            if other.phase is NodePhase.PENDING and other.type == block.type and other.id not in change.unsettled
        ]
        unneeded = [other for other in pending if other.idle_since is not None]
        youngest = max(pending, key=lambda other: (other.since, other.id), default=None)
        node = min(unneeded, key=lambda other: (other.idle_since, other.id), default=youngest)
    if node is not None:  # (1)
        lose(change, node)
        change.emit(KillAgent(node.id))


def storage_seen(change: Change, event: StorageSeen) -> None:
    """What is in force goes on and can be changed; whoever waits is told, as it may be why."""
    change.storage = event.trouble


def _retire_all(change: Change, node: str, reason: str) -> None:
    for engine in change.nodes.rows[node].engines:
        retire(change, change.engines.rows[engine], reason)


# --- after a restart ---
def started(change: Change, event: Started) -> None:
    """A controller's life begins; the catalog (``CatalogChanged``) came before. Everything else is told again: slots
    and servers by this event, nodes and engines by a ``NodeJoined`` of each node named here."""
    change.epoch = event.epoch
    change.settled = False
    change.started_at = change.now
    change.found = event.servers
    change.unsettled = frozenset(event.nodes)
    change.pinned |= event.pinned & frozenset(change.models)
    for engine in list(change.engines.rows.values()):
        change.drop_engine(engine)
    for table in (change.nodes, change.closing, change.slots, change.apart):
        for key in list(table.rows):
            table.drop(key)
    for node in sorted(event.nodes):
        change.nodes.put(node, Node(node, kind_of(node), NodePhase.PENDING, since=change.now))
    taken: set[int] = set()
    for name, slot in sorted(event.slots.items()):
        if name in change.models and slot not in taken and slot < change.policy.slots:
            change.slots.put(name, slot)
            taken.add(slot)
    for name in event.apart & change.models.keys():
        keep_apart(change, name, APART_S)


def settle(change: Change) -> None:
    """From here on the controller acts: (1) every node found has reported, or had ``settle_s`` to; (2) servers that no
    engine was found for are closed; (3) waiters that came before the catalog get their model."""
    late = change.now >= change.started_at + change.policy.settle_s
    if change.epoch == 0 or (change.unsettled and not late):  # (1)
        return
    change.settled = True
    change.unsettled = frozenset()
    change.slots_changed = True  # say it once, so that the edge is equal to the fleet
    for server in change.found:  # (2)
        name = stray(server)
        change.closing.put(name, ClosingRoute(name, server.slot, server.server, since=change.now, pending=False))
    change.found = ()
    resolve_names(change)  # (3)


def stray(server: FoundServer) -> str:
    """The engine id under which a server without an engine is closed."""
    return f"unknown-slot{server.slot}-e{server.server}"
