"""The fleet as people and programs see it: plain data, ready for JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from serve.core.events import Priority, SeenBlock
from serve.core.forecast import Forecast, model_state, models_before, stall_words
from serve.core.shares import positions
from serve.core.state import Engine, EngineState, Fleet, Node, RouteState, serving, stalled
from serve.core.supply import describe


def model_view(
    fleet: Fleet, name: str, now: float, *, detail: bool = False, forecast: Forecast | None = None
) -> dict[str, Any]:
    """One model, as ``GET /v1/models`` lists it: OpenAI's keys, then ours. ``detail``: for administrators.

    An engine's last output may contain paths, hosts and other users' prompts: users see only how it ended.
    """
    model = fleet.models[name]
    engines = [fleet.engines[engine] for engine in fleet.model_engines.get(name, ())]
    failure, weights = fleet.failures.get(name), None if engines else fleet.weights.get(name)
    said = None if failure is None else failure.reason if detail else failure.summary
    if weights is not None:
        said = None if weights.fetching or weights.may_fetch else weights.detail if detail else weights.reason
    halted = [one for one in engines if one.stalled_since is not None]
    still = next((words for one in halted if (words := stall_words(fleet, one, now))), None) if halted else None
    forecast = forecast or Forecast(fleet, now)
    state = model_state(fleet, name, engines)
    memory = {"gpus": model.gpus, "memory_gib": model.memory_gib, "predicted_gib": model.predicted_gib}
    reason = forecast.waiting_reason(name, detail=detail) if state in ("queued", "fetching") or fleet.storage else None
    if still or said:
        reason = "; ".join(filter(None, (still or said, fleet.storage)))
    return {
        "id": name,
        "object": "model",
        "owned_by": "gateway",
        "task": model.task,
        "aliases": list(model.aliases),
        "adapters": list(model.adapters or ()),
        "state": state,
        "eta_s": 0.0 if state == "ready" and serving(engines[0]) else forecast.eta_s(name),
        "pinned": name in fleet.pinned,
        "in_flight": sum([engine.in_flight for engine in engines]),
        "waiting": len(fleet.queues.get(name, ())),
        "nodes": sorted({part.node for engine in engines for part in engine.parts}) if engines else [],
        "reason": reason,
        **(memory if detail else {}),
    }


def outlook_view(fleet: Fleet, model: str, now: float) -> dict[str, Any]:
    """``{"name", "state", "eta_s", "reason", "apart_since", "hang_after_s", "positions", "models_before"}`` of a model,
    by name or alias. ``positions``: ticket -> position among its waiters; ``models_before``: how many models get room
    before it, ``None`` where it does not wait for room.
    """
    name = fleet.names.get(model)
    if name is None:
        unknown = dict.fromkeys(("eta_s", "reason", "apart_since", "hang_after_s", "models_before"))
        return {"name": model, "state": "unknown", "positions": {}, **unknown}
    entry = model_view(fleet, name, now, forecast=Forecast(fleet, now))
    apart = fleet.apart.get(name)
    return {
        "name": name,
        **{key: entry[key] for key in ("state", "eta_s", "reason")},
        "apart_since": None if apart is None else apart.since,
        "hang_after_s": fleet.models[name].hang_after_s,
        "positions": positions(fleet.waiters[ticket] for ticket in fleet.queues.get(name, ())),
        "models_before": models_before(fleet, name) if entry["state"] == "queued" else None,
    }


def models_view(fleet: Fleet, now: float, *, detail: bool = False) -> list[dict[str, Any]]:
    """Every model of the catalog, by name."""
    forecast = Forecast(fleet, now)
    return [model_view(fleet, name, now, detail=detail, forecast=forecast) for name in sorted(fleet.models)]


def engine_view(fleet: Fleet, engine: Engine, now: float) -> dict[str, Any]:
    """One engine and its route."""
    head, halted = engine.parts[0], engine.stalled_since is not None
    return {
        "id": engine.id,
        "model": engine.model,
        "node": head.node,
        "gpus": list(head.gpus),
        "memory_mib": head.mib,
        "state": "stalled" if halted and stalled(engine) else engine.state._value_,  # ``value`` is slow
        "route": engine.route._value_,
        "up": engine.up,
        "in_flight": engine.in_flight,
        "age_s": round(max(0.0, now - engine.started), 1),
        "loaded_s": engine.loaded_s,
        "can_sleep": engine.can_sleep,
        "sleep_mib": engine.sleep_mib,
        "address": engine.address,
        "stop_reason": engine.stop_reason or None,
        "reason": stall_words(fleet, engine, now) if halted else None,
    }


def node_view(fleet: Fleet, node: Node, block: SeenBlock | None, now: float) -> dict[str, Any]:
    """One node, its free room, and the scheduler's report on its block (of a pending node: one that is on its way)."""
    return {
        "id": node.id,
        "type": node.type,
        "phase": node.phase._value_,
        "block": node.block,
        "address": node.address,
        "host_mib": node.host_mib,
        "gpu_mib": list(node.gpu_mib),
        "free_mib": node.free_host_mib,
        "free_gpu_mib": list(node.free_gpu_mib),
        "sleep_mib": node.sleep_mib,
        "free_sleep_mib": node.free_sleep_mib,
        "models": sorted([fleet.engines[engine].model for engine in node.engines]),
        "age_s": round(max(0.0, now - node.since), 1),
        "job": block.job if block is not None else None,
        "host": block.host if block is not None else None,
        "reason": block.reason if block is not None else None,
        "starts_in_s": _until(block.starts_at, now) if block is not None and block.phase.queued else None,
        "ends_in_s": _until(node.ends_at, now),
        "leaves_in_s": _until(node.leave_at, now),
        "ending": node.ending,
    }


def _until(when: float | None, now: float) -> float | None:
    return None if when is None else round(when - now, 1) if when > now else 0.0


def nodes_view(fleet: Fleet, now: float) -> list[dict[str, Any]]:
    """Every node, by id."""
    blocks = Forecast(fleet, now).blocks_of()
    return [node_view(fleet, fleet.nodes[name], blocks.get(name), now) for name in sorted(fleet.nodes)]


def types_view(fleet: Fleet, now: float) -> list[dict[str, Any]]:
    """One row for every node type of the site: how many blocks run and wait, how many there may be, the memory of a
    node, and for the block that waits longest why and until when; ``trouble``: why none is requested before
    ``retry_in_s`` has passed."""
    rows = []
    for kind in sorted(fleet.policy.node_types, key=lambda kind: kind.name):
        blocks = [block for block in fleet.blocks.values() if block.type == kind.name and not block.phase.ended]
        queued = sorted((b for b in blocks if b.phase.queued), key=lambda b: (b.asked_at, b.name))
        oldest = queued[0] if queued else None
        starts_at = oldest.starts_at if oldest is not None else None
        rows.append(
            {
                "type": kind.name,
                "running": len(blocks) - len(queued),
                "pending": len(queued),
                "max": kind.max_nodes,
                "host_mib": kind.host_mib,
                "gpu_mib": list(kind.gpu_mib),
                "reason": oldest.reason if oldest is not None else None,
                "starts_in_s": _until(starts_at, now),
                **_backoff(fleet, kind.name, now),
            }
        )
    return rows


def _backoff(fleet: Fleet, kind: str, now: float) -> dict[str, Any]:
    backoff, failure = fleet.backoffs.get(kind), fleet.agent_failures.get(kind)
    if backoff is not None:
        return {"trouble": describe(kind, backoff), "retry_in_s": _until(backoff.retry_at, now)}
    if failure is not None:
        said = f"No agent could be made for a node of type '{kind}': {failure.reason.rstrip('.')}"
        return {"trouble": said, "retry_in_s": _until(failure.retry_at, now)}
    return {"trouble": None, "retry_in_s": None}


def status_view(fleet: Fleet, now: float) -> dict[str, Any]:
    """The whole status, as ``GET /gateway/v1/status`` shows it to administrators."""
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
            "kinds": [kind.name for kind in fleet.policy.node_types],
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
    """How many requests wait for each model that has waiters."""
    return dict(Counter(waiter.model for waiter in fleet.waiters.values()))


def waiting_by_class(fleet: Fleet) -> dict[str, int]:
    """How many requests wait in each class of priority; every class is there."""
    found = Counter(waiter.requester.priority for waiter in fleet.waiters.values())
    return {priority.value: found[priority] for priority in Priority}
