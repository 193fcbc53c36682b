"""Node agents: joined, gone, failed."""

from __future__ import annotations

from serve.core.effects import CreateAgent, KillAgent, SleepEngine, WakeEngine
from serve.core.events import FoundEngine, NodeFailed, NodeGone, NodeJoined, Part
from serve.core.frozen import replace
from serve.core.spread import Spread
from serve.core.state import Engine, EngineState, Failure, Node, NodePhase, RouteState, live
from serve.core.transaction import Transaction
from serve.core.transitions import (
    begin_stop,
    begin_stop_all,
    close_route,
    fell_asleep,
    forget,
    know_block,
    lose,
    made_ready,
    woke,
)


def node_joined(tx: Transaction, event: NodeJoined) -> None:
    """An agent reports its engines: (1) an unknown node without engines was released before it joined: it ends, and its
    fresh block is left to the next agent;
    (2) engines of ours that it does not have are gone; (3) known ones are compared; (4) unknown ones are adopted."""
    node = tx.nodes.rows.get(event.node)
    if node is None:
        if not event.engines:  # (1)
            tx.emit(KillAgent(event.node, block_goes=False))
            return
        node = Node(event.node, event.type, NodePhase.UP, since=tx.now)
    found = {engine.id: engine for engine in event.engines}
    for engine in [tx.engines.rows[known] for known in node.engines]:
        if engine.id not in found:  # (2)
            forget(tx, engine)
    left = tx.nodes.rows.get(node.id, node).engines
    phase = NodePhase.LEAVING if node.drain_asked else NodePhase.UP
    fresh = node.phase is NodePhase.PENDING and node.id not in tx.unsettled
    joined = replace(
        node,
        type=event.type,
        phase=phase,
        since=node.since if node.phase is phase else tx.now,
        address=event.address,
        block=event.block,
        idle_since=None if left else node.idle_since if node.phase is phase else tx.now,
        engines=left,
        joined_at=tx.now if fresh else node.joined_at,
    )
    tx.describe_node(joined, event.host_mib, event.gpu_mib, event.sleep_mib)
    know_block(tx, tx.nodes.rows[joined.id])
    for one in event.engines:
        known = tx.engines.rows.get(one.id)
        if known is None:  # (4)
            _adopt(tx, node.id, one)
        else:  # (3)
            _compare(tx, known, one)
    if joined.drain_asked:
        begin_stop_all(tx, joined.id, "node-ends" if joined.ending else "node-leaving")
    tx.unsettled -= {event.node}
    tx.agent_failures.drop(event.type)
    tx.joined_blocks |= {event.block}


def _compare(tx: Transaction, known: Engine, found: FoundEngine) -> None:
    """An engine of ours in the report of another agent on its node: (1) loading: it may be ready by now; (2) being
    stopped: the command is sent again; (3) falling asleep or waking: it may have ended, else the command is sent again.
    (An engine whose agent was lost in the middle of that is in doubt: that agent's successor ends it.)"""
    if known.state is EngineState.LOADING:  # (1)
        known = tx.set_engine(known, address=found.address)
        if found.ready:
            made_ready(
                tx, known, found.address, found.loaded_s, can_sleep=found.can_sleep, sleep_mib=found.sleep_mib
            )  # fmt: skip
    elif known.state is EngineState.STOPPING:  # (2)
        tx.set_engine(known, stop_sent=False)
    elif known.state is EngineState.FALLING_ASLEEP and not found.under_way:  # (3)
        if found.asleep:
            fell_asleep(tx, known, found.sleep_mib, found.kept_mib)
        elif found.ready:
            tx.emit(SleepEngine(known.id, known.node, tx.epoch))
    elif known.state is EngineState.WAKING and not found.under_way:
        if found.asleep:
            tx.emit(WakeEngine(known.id, known.node, tx.epoch))
        elif found.ready:
            woke(tx, known, None)


def _adopt(tx: Transaction, node: str, found: FoundEngine) -> None:
    """Adopt an engine process that is not in the fleet. A server that the edge has open for it stays open.

    (1) ready, its server open: nothing is done to it; (2) ready, its server draining: the drain goes on or is taken
    back; (3) ready, no server: its route is opened; (4) not ready: it loads; (5) its model is unknown, its key is (no
    slot), its memory is not there, or its model loads in as many engines as it may have: it is stopped; (6) it sleeps,
    falls asleep or wakes: so it goes on, and a server that the edge has for it is closed; (7) a model keeps as many
    engines as are found.
    """
    slot = tx.slots.rows.get(found.model)
    server = next((s for s in tx.found if s.address == found.address and slot in (None, s.slot)), None)
    if server is not None:
        tx.found = tuple(other for other in tx.found if other is not server)
        slot = server.slot
    used = server is not None and server.idle_s >= 0
    draining = server is not None and server.draining
    state = EngineState.LOADING  # (4)
    if found.asleep or found.under_way:  # (6)
        asleep_or_waking = {"": EngineState.ASLEEP, "sleep": EngineState.FALLING_ASLEEP, "wake": EngineState.WAKING}
        state, draining = asleep_or_waking[found.under_way], False
    elif found.ready or server is not None:
        state = EngineState.DRAINING if draining else EngineState.READY  # (1), (2), (3)
    engine = Engine(
        id=found.id,
        model=found.model,
        parts=(Part(node, found.gpus, found.memory_mib),),
        state=state,
        since=tx.now,
        started=found.started,
        loaded_s=found.loaded_s,
        address=found.address,
        route=RouteState.NONE if server is None else RouteState.DRAINING if draining else RouteState.OPEN,
        server=None if server is None else server.server,
        up=server is not None and server.up,
        in_flight=0 if server is None else server.in_flight,
        last_used=tx.now - server.idle_s if server is not None and used else 0.0,
        stop_reason="evicted" if draining else "",
        slot=slot,
        drained=draining,
        fresh_from=tx.now,
        granted_at=tx.now,
        can_sleep=found.can_sleep,
        slept=found.sleep_mib > 0 and state is not EngineState.LOADING,
        sleep_mib=found.sleep_mib,
        kept_mib=found.kept_mib,
    )
    model = tx.models.get(found.model)
    loading = sum(other.state is EngineState.LOADING for other in tx.engines_of(found.model))
    too_many = state is EngineState.LOADING and model is not None and loading >= model.replicas_max
    tx.add_engine(engine)
    if state not in (EngineState.LOADING, EngineState.READY, EngineState.DRAINING):
        engine = close_route(tx, engine)
    if found.loaded_s is not None:
        tx.load_s.put(found.model, found.loaded_s)
    host = tx.nodes.rows[node]
    if model is None:  # (5)
        begin_stop(tx, engine, "catalog")
    elif slot is None:
        begin_stop(tx, engine, "no-slot")
    elif too_many:
        begin_stop(tx, engine, "abandoned")
    elif min((host.free_host_mib, *host.free_gpu_mib)) < 0 or any(gpu >= len(host.gpu_mib) for gpu in found.gpus):
        begin_stop(tx, engine, "over-committed")
    elif found.asleep and host.free_sleep_mib < 0:
        begin_stop(tx, engine, "sleep-memory")
    if model is not None and (spread := tx.spreads.rows.get(model.name)) is not None:  # (7)
        count = min(model.replicas_max, sum(map(live, tx.engines_of(model.name))))
        if count > spread.wanted:
            tx.spreads.put(model.name, Spread(count, tx.now, count, tx.now))


def node_gone(tx: Transaction, event: NodeGone) -> None:
    """(1) unknown: ignored; (2) only its agent died: ask for another there, its engines run on; (3) a second agent died
    before it reported, or the node is gone: its engines are gone, their routes are closed, waiters wait on."""
    node = tx.nodes.rows.get(event.node)
    if node is None:  # (1)
        return
    if event.node_alive and node.phase in (NodePhase.UP, NodePhase.LEAVING):  # (2)
        tx.nodes.put(node.id, replace(node, phase=NodePhase.ORPHANED, since=tx.now))
        tx.emit(CreateAgent(node.id, node.type, node.block))
        return
    lose(tx, node)  # (3)


def node_failed(tx: Transaction, event: NodeFailed) -> None:
    """No agent could be created: the next of that type is requested after a back-off."""
    node = tx.nodes.rows.get(event.node)
    if node is None:
        return
    last = tx.agent_failures.rows.get(node.type)
    count = 1 + (last.count if last is not None else 0)
    delay = min(tx.policy.retry_max_s, tx.policy.retry_first_s * 2.0 ** min(count - 1, 30))
    tx.agent_failures.put(node.type, Failure(count, tx.now, tx.now + delay, event.reason))
    lose(tx, node)
