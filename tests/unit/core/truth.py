"""What must never happen, checked against the truth that the world knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serve.core.effects import SleepEngine, StartEngine, StopEngine
from serve.core.policies import pressure
from serve.core.room import Room, need_of
from serve.core.state import Engine, EngineState, NodePhase, RouteState, live, reservation, serving, stays
from serve.core.step import DEFAULT
from serve.core.table import Rows
from serve.core.transaction import Transaction

if TYPE_CHECKING:
    from tests.unit.core.things import Agent
    from tests.unit.core.world import World

SLEEP_MIB = 8 * 1024
"""Host memory for sleep of each node with GPUs."""
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
    """A model has at most ``replicas_max`` engines, one more while it is handed over, and never starts on a node that
    leaves. What loads on a node whose end is near does not count."""
    assert not world.blocks.is_leaving(effect.node), "an engine was started on a node that leaves"
    ending = {node.id for node in world.fleet.nodes.values() if node.ending}
    most = world.models[effect.model.name].replicas_max
    loading = [
        process.id
        for agent in world.agents.values()
        for process in agent.processes.values()
        if process.model == effect.model.name and not (process.ready or process.stopping or agent.id in ending)
    ]
    assert len(loading) < most, f"{loading} load already"
    engines = [one for one in world.fleet.engines.values() if one.model == effect.model.name and live(one)]
    staying = [one for one in engines if one.node not in ending]
    assert len(staying) <= most, f"{effect.engine} is one too many: {[one.id for one in staying]}"
    assert len(engines) <= most + 1 or len(staying) == 1, "handed over by more than one at a time"


def check_alone(agent: Agent, gpus: tuple[int, ...], engine: str = "") -> None:
    """Nothing starts or ends, falls asleep or wakes on a GPU while an engine loads, falls asleep or wakes there that is
    not being stopped."""
    stopped = {command.engine for command in agent.commands if isinstance(command, StopEngine)}
    loading = [
        process.id
        for process in agent.processes.values()
        if process.id not in (engine, *stopped)
        and (not process.ready or process.sleep in ("sleep", "wake"))
        and {*process.gpus} & {*gpus}
    ]
    assert not loading, f"{loading} load, fall asleep or wake on the same GPU"


def check_sleep(world: World, effect: SleepEngine) -> None:
    """No engine is put to sleep with a request in flight, or on a node that leaves."""
    process = world.processes().get(effect.engine)
    assert process is None or process.can_sleep
    busy = sum(s.in_flight for s in world.servers.values() if process is not None and s.address == process.address)
    assert busy == 0, f"{effect.engine} is put to sleep with {busy} in flight"
    assert not world.fleet.nodes[effect.node].drain_asked


def check_memory(agent: Agent, gpu_mib: tuple[int, ...], host_mib: int) -> None:
    """What the processes hold is there: of GPUs, of the host, and of the host for sleep."""
    held = [0] * len(gpu_mib)
    for one in agent.processes.values():
        for gpu in one.gpus:
            held[gpu] += one.kept_mib if one.sleep == "asleep" else one.memory_mib
    assert all(used <= total for used, total in zip(held, gpu_mib, strict=True)), "over-committed"
    assert sum(one.memory_mib for one in agent.processes.values() if not one.gpus) <= host_mib
    assert sum(one.pinned_mib for one in agent.processes.values()) <= SLEEP_MIB, "sleep memory is over-committed"


def check_ask(world: World, kind: str) -> None:
    """No node is asked for that nobody needs: there are at most as many pending as engines are lacking, the first of a
    model or a further one that its load calls for."""
    fleet = world.fleet
    pending = sum(node.type == kind and node.phase is NodePhase.PENDING for node in fleet.nodes.values())
    staying = {
        engine.model
        for engine in fleet.engines.values()
        if engine.state in (EngineState.LOADING, EngineState.READY) and not fleet.nodes[engine.node].ending
    }
    without = [m for m in world.models.values() if m.name not in staying and (m.gpus > 0) <= (kind == "gpu")]
    further = [
        model.name
        for model in world.models.values()
        if (spread := fleet.spreads.get(model.name)) is not None and (model.gpus > 0) <= (kind == "gpu")
        for _ in range(1, spread.wanted)
    ]
    lacking = [*(model.name for model in without), *further]
    assert pending <= len(lacking), f"{pending} {kind} nodes are pending for {lacking}"


def check_hand_over(world: World) -> None:
    """When an engine is drained because another one takes over, that one serves; or did, until it goes in the same step
    because nobody uses it."""
    for engine in world.fleet.engines.values():
        before = world.before.engines.get(engine.id)
        if engine.stop_reason == "handed-over" and (before is None or before.stop_reason != "handed-over"):
            others = [other for other in world.fleet.engines.values() if other.model == engine.model]
            staying = [other for other in others if not world.fleet.nodes[other.node].ending]
            assert any(serving(other) or _unused(world, other) for other in staying), [
                (other.id, other.state, other.stop_reason) for other in staying
            ]


def _unused(world: World, engine: Engine) -> bool:
    before = world.before.engines.get(engine.id)
    return before is not None and serving(before) and engine.stop_reason in ("idle", "evicted")


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
    assert all(count <= world.models[model].replicas_max for model, count in loading.items())
    places = [(e.slot, e.server) for e in fleet.engines.values() if e.server is not None]
    places += [(c.slot, c.server) for c in fleet.closing.values()]
    assert len(places) == len(set(places)), "two engines on one server"
    assert set(fleet.waiters) <= set(world.waiting), "somebody waits who is not there"
    assert {t for tickets in fleet.queues.values() for t in tickets} == set(fleet.waiters)
    assert dict(fleet.moving) == {
        engine.id: engine.state
        for engine in fleet.engines.values()
        if (engine.state is not EngineState.READY or engine.route is not RouteState.OPEN)
        and engine.state is not EngineState.ASLEEP
    }
    for table in (fleet.nodes, fleet.engines, fleet.slots):
        for key, found in table.known.items() if isinstance(table, Rows) else ():
            find, *args = key if isinstance(key, tuple) else (key,)
            assert found == find(dict(table), *args), f"{find.__name__} is of earlier rows"
    assert sorted(one for ids in fleet.model_engines.values() for one in ids) == sorted(fleet.engines)
    for node in fleet.nodes.values():
        host, gpus = node.host_mib, list(node.gpu_mib)
        for engine in (fleet.engines[one] for one in node.engines):
            for part in (part for part in reservation(engine) if part.node == node.id):
                host -= 0 if part.gpus else part.mib
                for gpu in part.gpus:
                    gpus[gpu] -= part.mib
        assert (host, tuple(gpus)) == (node.free_host_mib, node.free_gpu_mib)
        assert min((host, *gpus)) >= 0, "over-committed"
        slept = sum(fleet.engines[one].sleep_mib for one in node.engines)
        assert node.free_sleep_mib == node.sleep_mib - slept
        assert node.free_sleep_mib >= 0, "sleep memory is over-committed"
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
        if tx.attended(name) is None:
            continue  # its clients have gone: it takes no room of what waits for its first request
        if any(live(one) for one in tx.engines_of(name)) or (failure is not None and world.now < failure.retry_at):
            continue
        if name in fleet.slots:  # else it waits for a slot at the edge
            _check_room(world, tx, name)
        return


def _check_room(world: World, tx: Transaction, name: str) -> None:
    need, may_go = need_of(world.fleet.models[name]), [engine for _, engine in pressure.candidates(tx, name)]
    made = possible = False
    if any(one.state is EngineState.ASLEEP for one in tx.engines_of(name)):
        return  # it may wait for the GPUs on which it sleeps
    for node in filter(stays, world.fleet.nodes.values()):
        room = Room(node.free_host_mib, node.free_gpu_mib)
        engines = [world.fleet.engines[one] for one in node.engines]
        for engine in engines:
            if engine.state in (EngineState.DRAINING, EngineState.STOPPING, EngineState.FALLING_ASLEEP):
                room = room.without(engine, node.id)
        made = made or room.devices(need) is not None
        for engine in engines:
            room = room.without(engine, node.id) if engine in may_go else room
        possible = possible or room.devices(need) is not None
    assert made or not possible, f"{name} is near its bound, and nothing makes way for it"
