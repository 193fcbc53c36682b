"""What must never happen, checked against the truth that the world knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serve.core.effects import StartEngine, StopEngine
from serve.core.policies import pressure
from serve.core.room import Room, need_of
from serve.core.state import Engine, EngineState, NodePhase, RouteState, live, serving, stays
from serve.core.step import DEFAULT
from serve.core.transaction import Transaction

if TYPE_CHECKING:
    from tests.unit.core.things import Agent
    from tests.unit.core.world import World

ENDS = ("node-ends", "handed-over")
"""An engine that drains for these has until its node leaves, whatever its model's ``drain_timeout_s``."""


def check_stop(world: World, effect: StopEngine) -> None:
    """No engine is stopped with a request in flight, unless its drain deadline passed."""
    process = world.processes().get(effect.engine)
    if process is None or not process.ready:
        return
    before = world.before.engines.get(effect.engine)  # None: found and let go in one step
    timeout = world.models[process.model].drain_timeout_s
    overdue = (
        before is not None
        and before.state is EngineState.DRAINING
        and (_leaves(world, before) or (before.stop_reason not in ENDS and world.now >= before.since + timeout))
    )
    busy = sum(s.in_flight for s in world.servers.values() if s.address == process.address)
    assert overdue or busy == 0, f"{effect.engine} stopped ({effect.reason}) with {busy} in flight"


def _leaves(world: World, engine: Engine) -> bool:
    leaves_at = world.blocks.leaves_at(engine.node)
    return leaves_at is not None and world.now >= leaves_at


def check_start(world: World, effect: StartEngine) -> None:
    """A model is loading at most once per wanted replica, and never on a node that leaves. What loads on a node whose
    end is near does not count."""
    assert not world.blocks.is_leaving(effect.node), "an engine was started on a node that leaves"
    ending = {node.id for node in world.fleet.nodes.values() if node.ending}
    for agent in world.agents.values():
        for process in agent.processes.values():
            if process.model == effect.model.name and not process.ready and not process.stopping:
                assert agent.id in ending, f"{process.id} loads already"


def check_alone(agent: Agent, gpus: tuple[int, ...]) -> None:
    """Nothing starts or ends on a GPU while an engine loads there."""
    loading = [process.id for process in agent.processes.values() if not process.ready and {*process.gpus} & {*gpus}]
    assert not loading, f"{loading} load on the same GPU"


def check_ask(world: World, kind: str) -> None:
    """No node is asked for that nobody needs: there are at most as many pending as models without an engine that is to
    stay."""
    fleet = world.fleet
    pending = sum(node.type == kind and node.phase is NodePhase.PENDING for node in fleet.nodes.values())
    staying = {
        engine.model
        for engine in fleet.engines.values()
        if engine.state in (EngineState.LOADING, EngineState.READY) and not fleet.nodes[engine.node].ending
    }
    without = [m for m in world.models.values() if m.name not in staying and (m.gpus > 0) <= (kind == "gpu")]
    assert pending <= len(without), f"{pending} {kind} nodes are pending for {[model.name for model in without]}"


def check_hand_over(world: World) -> None:
    """When an engine is drained because another one takes over, that one serves."""
    for engine in world.fleet.engines.values():
        before = world.before.engines.get(engine.id)
        if engine.stop_reason == "handed-over" and (before is None or before.stop_reason != "handed-over"):
            others = [other for other in world.fleet.engines.values() if other.model == engine.model]
            assert any(serving(other) for other in others if not world.fleet.nodes[other.node].ending)


def check_slots(world: World, names: Any, fresh: tuple[int, ...]) -> None:
    """A slot goes to another model only when nothing of its tenant runs, and a key changes under no request."""
    for slot in fresh:
        assert not any(server.in_flight for (s, _), server in world.servers.items() if s == slot)
    model_of = {name: model.name for model in world.models.values() for name in model.names}
    for name, slot in names.items():
        for tenant, other in world.names.items():
            if other == slot and model_of[tenant] != model_of[name]:
                running = [p.id for p in world.processes().values() if p.model == model_of[tenant]]
                assert not running, f"a slot was taken from {running}"


def check(world: World) -> None:
    """What must hold after every event."""
    fleet = world.fleet
    loading: dict[str, int] = {}
    for engine in fleet.engines.values():
        if engine.route is RouteState.OPEN:
            assert engine.state in (EngineState.READY, EngineState.DRAINING)
        if engine.state is EngineState.LOADING and not fleet.nodes[engine.node].ending:
            loading[engine.model] = loading.get(engine.model, 0) + 1
    assert all(count == 1 for count in loading.values())
    places = [(e.slot, e.server) for e in fleet.engines.values() if e.server is not None]
    places += [(c.slot, c.server) for c in fleet.closing.values()]
    assert len(places) == len(set(places)), "two engines on one server"
    assert set(fleet.waiters) <= set(world.waiting), "somebody waits who is not there"
    assert {t for tickets in fleet.queues.values() for t in tickets} == set(fleet.waiters)
    assert dict(fleet.moving) == {
        engine.id: engine.state
        for engine in fleet.engines.values()
        if engine.state is not EngineState.READY or engine.route is not RouteState.OPEN
    }
    assert sorted(one for ids in fleet.model_engines.values() for one in ids) == sorted(fleet.engines)
    for node in fleet.nodes.values():
        host, gpus = node.host_mib, list(node.gpu_mib)
        for engine in (fleet.engines[one] for one in node.engines):
            for part in engine.on(node.id):
                host -= 0 if part.gpus else part.mib
                for gpu in part.gpus:
                    gpus[gpu] -= part.mib
        assert (host, tuple(gpus)) == (node.free_host_mib, node.free_gpu_mib)
        assert min((host, *gpus)) >= 0, "over-committed"
    assert sum(len(node.engines) for node in fleet.nodes.values()) == len(fleet.engines)
    for kind in world.policy.node_types:
        assert sum(node.type == kind.name for node in fleet.nodes.values()) <= kind.max_nodes


def check_bound(world: World) -> None:
    """A model near its bound is next: the first of those that wait so long for room has some, or gets it, wherever
    there would be some without the engines that may go."""
    fleet = world.fleet
    tx = Transaction(fleet, world.now, DEFAULT)
    for name in pressure.order(tx):
        if name not in fleet.queues or not pressure.weight(tx, name).overdue:
            return
        failure = fleet.failures.get(name)
        if any(live(one) for one in tx.engines_of(name)) or (failure is not None and world.now < failure.retry_at):
            continue
        if name in fleet.slots:  # else it waits for a slot at the edge
            _check_room(world, tx, name)
        return


def _check_room(world: World, tx: Transaction, name: str) -> None:
    need, may_go = need_of(world.fleet.models[name]), [engine for _, engine in pressure.candidates(tx, name)]
    made = possible = False
    for node in filter(stays, world.fleet.nodes.values()):
        room = Room(node.free_host_mib, node.free_gpu_mib)
        engines = [world.fleet.engines[one] for one in node.engines]
        for engine in engines:
            if engine.state in (EngineState.DRAINING, EngineState.STOPPING):
                room = room.without(engine, node.id)
        made = made or room.devices(need) is not None
        for engine in engines:
            room = room.without(engine, node.id) if engine in may_go else room
        possible = possible or room.devices(need) is not None
    assert made or not possible, f"{name} is near its bound, and nothing makes way for it"
