"""One load at a time on a GPU, and no stop while it lasts.

An engine measures a GPU's free memory while it loads (vLLM's profiling), and fails where another one takes or gives
back memory meanwhile. Host memory is not measured so: engines without a GPU load side by side.
"""

from __future__ import annotations

from collections.abc import Iterable

from serve.core.blocks import stays
from serve.core.eviction import Need, Room
from serve.core.fleet import Engine, EngineState, Fleet


def loads_beside(engine: Engine, others: Iterable[Engine]) -> Engine | None:
    """Of the engines on its node, the one whose load on a GPU of its own it must wait for before it is stopped."""
    mine = frozenset(engine.gpus)
    loading = [
        other
        for other in others
        if other.state is EngineState.LOADING and other.id != engine.id and not mine.isdisjoint(other.gpus)
    ]
    return min(loading, key=lambda other: other.id, default=None)


def unsettles(engine: Engine, *, due: bool) -> bool:
    """Whether nothing may start on its GPUs. ``due``: its drain is over, and it only waits to be stopped; if others
    could start meanwhile, it would wait for ever."""
    if engine.state is EngineState.DRAINING:
        return due
    return engine.state in (EngineState.LOADING, EngineState.STOPPING)


def waits_for(fleet: Fleet, need: Need) -> Engine | None:
    """The engine that a model waits for because it loads or stops on a GPU that ``need`` could have had.

    (1) there is free room on quiet GPUs: none; (2) there is free room, but where something loads or stops; (3) what
    gives room up must wait for a load before it is stopped.
    """
    found: Engine | None = None
    for node in sorted((node for node in fleet.nodes.values() if need.gpus and stays(node)), key=lambda node: node.id):
        engines = [fleet.engines[engine] for engine in node.engines]
        at = {gpu: engine for engine in engines if unsettles(engine, due=engine.quiet) for gpu in engine.gpus}
        devices = Room(node.free_host_mib, node.free_gpu_mib).devices(need, last=at)
        if devices is not None:
            if at.keys().isdisjoint(devices):  # (1)
                return None
            found = found or next(at[gpu] for gpu in devices if gpu in at)  # (2)
            continue
        going = [one for one in engines if one.state in (EngineState.DRAINING, EngineState.STOPPING)]
        held = (loads_beside(one, engines) for one in going if not one.stop_sent)
        found = found or next((other for other in held if other is not None), None)  # (3)
    return found


def wait_s(fleet: Fleet, engine: Engine, now: float) -> float:
    """How long the load or stop of ``engine`` may still take, in seconds."""
    if engine.state is not EngineState.LOADING:
        return 1.0
    return max(1.0, fleet.load_s.get(engine.model, fleet.policy.load_guess_s) - (now - engine.started))


def wait_words(engine: Engine) -> str:
    """Of ``waits_for``, for everybody."""
    done = "has loaded" if engine.state is EngineState.LOADING else "has ended"
    return f"waits until '{engine.model}' {done} on the same GPU"
