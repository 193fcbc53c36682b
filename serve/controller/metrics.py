"""Prometheus metrics of the controller: gauges from the fleet's present state, histograms and counters from events."""

from __future__ import annotations

from collections.abc import Iterable

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
        self._loads = Histogram(
            "gateway_load_seconds",
            "From the start of an engine's process to its first real answer",
            ["model"],
            buckets=_LOAD_BUCKETS_S,
            registry=self.registry,
        )
        self._sleeps = Histogram(
            "gateway_sleep_seconds",
            "From the command until an engine slept and its GPUs' memory was free",
            ["model"],
            buckets=_SLEEP_BUCKETS_S,
            registry=self.registry,
        )
        self._wakes = Histogram(
            "gateway_wake_seconds",
            "From the command until an engine answered as before it slept",
            ["model"],
            buckets=_SLEEP_BUCKETS_S,
            registry=self.registry,
        )
        self._doubts = Counter(
            "gateway_sleep_doubts",
            "Engines that were ended because their sleep or their waking went wrong",
            ["model"],
            registry=self.registry,
        )
        self._exits = Counter(
            "gateway_engine_exits", "Engine processes that ended", ["model", "expected"], registry=self.registry
        )
        self._switches = Counter(
            "gateway_switches",
            "Models evicted to make room for another, since this controller began",
            registry=self.registry,
        )
        self._requests = Counter(
            "gateway_requests",
            "Requests given to engines by the edge, since this controller began",
            ["model"],
            registry=self.registry,
        )
        self._waiting = Gauge(
            "gateway_waiting_requests", "Requests waiting for a model", ["model"], registry=self.registry
        )
        self._in_flight = Gauge(
            "gateway_in_flight_requests", "Requests inside engines", ["model"], registry=self.registry
        )
        self._queued = Gauge(
            "gateway_queued_requests", "Requests at the edge that wait for an engine", ["model"], registry=self.registry
        )
        self._engines = Gauge("gateway_engines", "Engines by state", ["state"], registry=self.registry)
        self._routes = Gauge("gateway_routes", "Routes by state", ["state"], registry=self.registry)
        self._nodes = Gauge("gateway_nodes", "Nodes by phase", ["phase"], registry=self.registry)
        self._blocks = Gauge(
            "gateway_blocks", "Blocks that hold a place, by phase", ["type", "phase"], registry=self.registry
        )
        self._next_end = Gauge(
            "gateway_block_ends_seconds",
            "Until the next walltime of a running block ends; no sample where none has one",
            ["type"],
            registry=self.registry,
        )
        self._queue_wait = Gauge(
            "gateway_block_queue_wait_seconds",
            "How long the block that started last had waited in the queue; no sample before there is one",
            ["type"],
            registry=self.registry,
        )
        self._by_class = Gauge(
            "gateway_waiting_requests_by_class",
            "Requests waiting for a model, by class of priority",
            ["class"],
            registry=self.registry,
        )
        self._decisions = Counter(
            "gateway_decisions",
            "Decisions on engines, or to let a model wait, since this controller began",
            ["action"],
            registry=self.registry,
        )
        for action in Action:
            self._decisions.labels(action.value)
        self._epoch = Gauge(
            "gateway_controller_epoch",
            "Number of this life of the controller: higher with each",
            registry=self.registry,
        )

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
        for name, count in requests.items():
            self._requests.labels(name).inc(count - self._told.get(name, 0))
            self._told[name] = count
        for name in fleet.models:
            self._waiting.labels(name).set(0)
            self._in_flight.labels(name).set(0)
            self._queued.labels(name).set(0)
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
