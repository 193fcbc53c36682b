"""Prometheus metrics of the controller: gauges from the fleet's present state, histograms and counters from events."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.core.events import EngineAsleep, EngineAwake, EngineExited, EngineReady, Event
from serve.core.state import Action, Decision, Fleet, NodePhase
from serve.core.views.blocks import blocks_by_phase, last_queue_wait_s, next_end_s
from serve.core.views.status import engines_by_state, routes_by_state, waiting_by_class, waiting_by_model

_SLEEP_BUCKETS_S = (0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_LOAD_BUCKETS_S = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """One registry; nothing global, so that tests can create several."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._told: dict[str, int] = {}  # model -> its requests, and "" -> switches, as last exposed
        histogram = partial(Histogram, registry=self.registry)
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        self._loads = histogram(
            "gateway_load_seconds",
            "From the start of an engine's process to its first real answer",
            ["model"],
            buckets=_LOAD_BUCKETS_S,
        )
        self._sleeps = histogram(
            "gateway_sleep_seconds",
            "From the command until an engine slept and its GPUs' memory was free",
            ["model"],
            buckets=_SLEEP_BUCKETS_S,
        )
        self._wakes = histogram(
            "gateway_wake_seconds",
            "From the command until an engine answered as before it slept",
            ["model"],
            buckets=_SLEEP_BUCKETS_S,
        )
        self._doubts = counter(
            "gateway_sleep_doubts", "Engines that were ended because their sleep or their waking went wrong", ["model"]
        )
        self._exits = counter("gateway_engine_exits", "Engine processes that ended", ["model", "expected"])
        self._switches = counter(
            "gateway_switches", "Models evicted to make room for another, since this controller began"
        )
        self._requests = counter(
            "gateway_requests", "Requests given to engines by the edge, since this controller began", ["model"]
        )
        self._waiting = gauge("gateway_waiting_requests", "Requests waiting for a model", ["model"])
        self._in_flight = gauge("gateway_in_flight_requests", "Requests inside engines", ["model"])
        self._queued = gauge("gateway_queued_requests", "Requests at the edge that wait for an engine", ["model"])
        self._engines = gauge("gateway_engines", "Engines by state", ["state"])
        self._routes = gauge("gateway_routes", "Routes by state", ["state"])
        self._nodes = gauge("gateway_nodes", "Nodes by phase", ["phase"])
        self._blocks = gauge("gateway_blocks", "Blocks that hold a place, by phase", ["type", "phase"])
        self._next_end = gauge(
            "gateway_block_ends_seconds",
            "Until the next walltime of a running block ends; no sample where none has one",
            ["type"],
        )
        self._queue_wait = gauge(
            "gateway_block_queue_wait_seconds",
            "How long the block that started last had waited in the queue; no sample before there is one",
            ["type"],
        )
        self._by_class = gauge(
            "gateway_waiting_requests_by_class", "Requests waiting for a model, by class of priority", ["class"]
        )
        self._decisions = counter(
            "gateway_decisions", "Decisions on engines, or to let a model wait, since this controller began", ["action"]
        )
        for action in Action:
            self._decisions.labels(action.value)
        self._epoch = gauge("gateway_controller_epoch", "Number of this life of the controller: higher with each")

    def count(self, before: Fleet, event: Event) -> None:
        """Count ``event``, received in the state ``before``."""
        if isinstance(event, EngineReady | EngineExited | EngineAsleep | EngineAwake):
            engine = before.engines.get(event.engine)
            if engine is None:
                return
            if isinstance(event, EngineReady):
                self._loads.labels(engine.model).observe(event.load_s)
            elif isinstance(event, EngineAsleep):
                self._sleeps.labels(engine.model).observe(event.took_s)
            elif isinstance(event, EngineAwake):
                self._wakes.labels(engine.model).observe(event.took_s)
            else:
                self._exits.labels(engine.model, str(event.expected).lower()).inc()
                if event.doubt or engine.stop_reason in ("sleep-timeout", "wake-timeout"):
                    self._doubts.labels(engine.model).inc()

    def count_decisions(self, decisions: Iterable[Decision]) -> None:
        """Count what one step decided."""
        for decision in decisions:
            self._decisions.labels(decision.action.value).inc()

    def text(self, fleet: Fleet, requests: dict[str, int], now: float) -> bytes:
        """The exposition of ``fleet`` at ``now``. ``requests``: model -> requests that the edge sent to its engines."""
        self._switches.inc(fleet.switches - self._told.get("", 0))
        self._told[""] = fleet.switches
        self._epoch.set(fleet.epoch)
        for gauge in (self._waiting, self._in_flight, self._queued):
            gauge.clear()
            for name in fleet.models:
                gauge.labels(name).set(0)
        for name, count in requests.items():
            self._requests.labels(name).inc(count - self._told.get(name, 0))
            self._told[name] = count
        for name, count in waiting_by_model(fleet).items():
            self._waiting.labels(name).set(count)
        for kind, count in waiting_by_class(fleet).items():
            self._by_class.labels(kind).set(count)
        for engine in fleet.engines.values():
            self._in_flight.labels(engine.model).inc(engine.in_flight)
            self._queued.labels(engine.model).inc(engine.queued)
        for state, count in engines_by_state(fleet).items():
            self._engines.labels(state).set(count)
        for state, count in routes_by_state(fleet).items():
            self._routes.labels(state).set(count)
        for phase in NodePhase:
            self._nodes.labels(phase.value).set(sum(node.phase is phase for node in fleet.nodes.values()))
        for (kind, held), count in blocks_by_phase(fleet).items():
            self._blocks.labels(kind, held).set(count)
        waits = last_queue_wait_s(fleet, now)
        for gauge, samples in ((self._next_end, next_end_s(fleet, now)), (self._queue_wait, waits)):
            gauge.clear()
            for kind, seconds in samples.items():
                gauge.labels(kind).set(seconds)
        return generate_latest(self.registry)
