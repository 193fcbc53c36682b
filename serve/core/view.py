"""What people and programs are shown of the fleet: plain data, ready for JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from serve.core.blocks import QUEUED
from serve.core.blocks_view import types_view
from serve.core.events import SeenBlock
from serve.core.expected import blocks_of
from serve.core.fleet import Engine, EngineState, Fleet, Node, RouteState
from serve.core.stalls import stall_words, stalled
from serve.core.waiting import eta_s, model_state, waiting_reason


def model_view(fleet: Fleet, name: str, now: float, *, detail: bool = False) -> dict[str, Any]:
    """One model, as ``GET /v1/models`` lists it: OpenAI's keys, then ours. ``detail``: for administrators.

    What an engine said last may hold paths, hosts, and what others asked: users are told how it ended.
    """
    model = fleet.models[name]
    engines = [fleet.engines[engine] for engine in fleet.model_engines.get(name, ())]
    failure = fleet.failures.get(name)
    said = None if failure is None else failure.reason if detail else failure.summary
    still = next((words for one in engines if (words := stall_words(fleet, one, now))), None)
    reason = waiting_reason(fleet, name, now, detail=detail)
    if still or said:
        reason = "; ".join(filter(None, (still or said, fleet.storage)))
    return {
        "id": name,
        "object": "model",
        "owned_by": "gateway",
        "task": model.task,
        "aliases": list(model.aliases),
        "state": model_state(fleet, name),
        "eta_s": eta_s(fleet, name, now),
        "pinned": name in fleet.pinned,
        "in_flight": sum(engine.in_flight for engine in engines),
        "waiting": len(fleet.queues.get(name, ())),
        "nodes": sorted({engine.node for engine in engines}),
        "reason": reason,
    }


def models_view(fleet: Fleet, now: float, *, detail: bool = False) -> list[dict[str, Any]]:
    """Every model of the catalog, by name."""
    return [model_view(fleet, name, now, detail=detail) for name in sorted(fleet.models)]


def engine_view(fleet: Fleet, engine: Engine, now: float) -> dict[str, Any]:
    """One engine and its route."""
    return {
        "id": engine.id,
        "model": engine.model,
        "node": engine.node,
        "gpus": list(engine.gpus),
        "memory_mib": engine.memory_mib,
        "state": "stalled" if stalled(engine) else engine.state.value,
        "route": engine.route.value,
        "up": engine.up,
        "in_flight": engine.in_flight,
        "age_s": round(max(0.0, now - engine.started), 1),
        "loaded_s": engine.loaded_s,
        "address": engine.address,
        "stop_reason": engine.stop_reason or None,
        "reason": stall_words(fleet, engine, now),
    }


def node_view(fleet: Fleet, node: Node, block: SeenBlock | None, now: float) -> dict[str, Any]:
    """One node, what is free on it, and what the scheduler says of its block (of a pending node: one that is on its
    way)."""
    host, gpus = node.host_mib, list(node.gpu_mib)
    models = []
    for engine in (fleet.engines[name] for name in node.engines):
        models.append(engine.model)
        if not engine.gpus:
            host -= engine.memory_mib
        for index in engine.gpus:
            if index < len(gpus):
                gpus[index] -= engine.memory_mib
    return {
        "id": node.id,
        "type": node.type,
        "phase": node.phase.value,
        "block": node.block,
        "address": node.address,
        "host_mib": node.host_mib,
        "gpu_mib": list(node.gpu_mib),
        "free_mib": host,
        "free_gpu_mib": gpus,
        "models": sorted(models),
        "age_s": round(max(0.0, now - node.since), 1),
        "job": block.job if block is not None else None,
        "host": block.host if block is not None else None,
        "reason": block.reason if block is not None else None,
        "starts_in_s": _until(block.starts_at, now) if block is not None and block.phase in QUEUED else None,
        "ends_in_s": _until(node.ends_at, now),
        "leaves_in_s": _until(node.leave_at, now),
        "ending": node.ending,
    }


def _until(when: float | None, now: float) -> float | None:
    return None if when is None else round(max(0.0, when - now), 1)


def nodes_view(fleet: Fleet, now: float) -> list[dict[str, Any]]:
    """Every node, by id."""
    blocks = blocks_of(fleet)
    return [node_view(fleet, fleet.nodes[name], blocks.get(name), now) for name in sorted(fleet.nodes)]


def status_view(fleet: Fleet, now: float) -> dict[str, Any]:
    """The whole of it, as ``GET /gateway/v1/status`` shows it to administrators."""
    return {
        "state": "ready" if fleet.settled else "starting",
        "epoch": fleet.epoch,
        "models": models_view(fleet, now, detail=True),
        "engines": [engine_view(fleet, fleet.engines[name], now) for name in sorted(fleet.engines)],
        "nodes": nodes_view(fleet, now),
        "types": types_view(fleet, now),
        "storage": fleet.storage or None,
        "waiting": len(fleet.waiters),
        "switches": fleet.switches,
        "policy": {
            "slots": fleet.policy.slots,
            "waiting_max": fleet.policy.waiting_max,
            "block_idle_s": fleet.policy.block_idle_s,
            "kinds": [kind.name for kind in fleet.policy.kinds],
        },
    }


def engines_by_state(fleet: Fleet) -> dict[str, int]:
    """How many engines are in each state; every state is there."""
    found = Counter(engine.state for engine in fleet.engines.values())
    return {state.value: found[state] for state in EngineState}


def routes_by_state(fleet: Fleet) -> dict[str, int]:
    """How many routes are in each state; every state but ``none`` is there."""
    found = Counter(engine.route for engine in fleet.engines.values())
    return {state.value: found[state] for state in RouteState if state is not RouteState.NONE}


def waiting_by_model(fleet: Fleet) -> dict[str, int]:
    """How many requests wait for each model that anybody waits for."""
    return dict(Counter(waiter.model for waiter in fleet.waiters.values()))
