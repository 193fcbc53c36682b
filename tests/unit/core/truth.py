"""What must never happen, checked against the truth that the world knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serve.core.effects import StopEngine
from serve.core.fleet import EngineState, RouteState

if TYPE_CHECKING:
    from tests.unit.core.world import World


def check_stop(world: World, effect: StopEngine) -> None:
    """No engine is stopped with a request in flight, unless its drain deadline passed."""
    process = world.processes().get(effect.engine)
    if process is None or not process.ready:
        return
    before = world.before.engines[effect.engine]
    timeout = world.models[process.model].drain_timeout_s
    overdue = before.state is EngineState.DRAINING and world.now >= before.since + timeout
    busy = sum(s.in_flight for s in world.servers.values() if s.address == process.address)
    assert overdue or busy == 0, f"{effect.engine} stopped ({effect.reason}) with {busy} in flight"


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
        if engine.state is EngineState.LOADING:
            loading[engine.model] = loading.get(engine.model, 0) + 1
    assert all(count == 1 for count in loading.values())
    places = [(e.slot, e.server) for e in fleet.engines.values() if e.server is not None]
    places += [(c.slot, c.server) for c in fleet.closing.values()]
    assert len(places) == len(set(places)), "two engines on one server"
    assert set(fleet.waiters) <= set(world.waiting), "somebody waits who is not there"
    assert {t for tickets in fleet.queues.values() for t in tickets} == set(fleet.waiters)
    for node in fleet.nodes.values():
        host, gpus = node.host_mib, list(node.gpu_mib)
        for engine in (fleet.engines[one] for one in node.engines):
            if not engine.gpus:
                host -= engine.memory_mib
            for gpu in engine.gpus:
                gpus[gpu] -= engine.memory_mib
        assert (host, tuple(gpus)) == (node.free_host_mib, node.free_gpu_mib)
        assert min((host, *gpus)) >= 0, "over-committed"
    assert sum(len(node.engines) for node in fleet.nodes.values()) == len(fleet.engines)
    for kind in world.policy.kinds:
        assert sum(node.type == kind.name for node in fleet.nodes.values()) <= kind.max_nodes
