"""The exposition: gauges from the fleet, counters from events."""

from __future__ import annotations

from dataclasses import replace

from serve.controller.metrics import Metrics
from serve.core.events import EngineAsleep, EngineAwake, EngineExited, EngineReady, Priority, Requester
from serve.core.state import Action, Decision, EngineState, Waiter
from tests.unit.controller.test_observer import ENGINE, FLEET


def lines(metrics: Metrics, fleet: object = FLEET) -> list[str]:
    return metrics.text(fleet, {"m": 12}, now=1000.0).decode().splitlines()  # type: ignore[arg-type]


def test_gauges_show_the_fleet_as_it_is() -> None:
    fleet = replace(
        FLEET, switches=3, waiters={"t": Waiter("t", "m", 0.0, 9.0)}, engines={"e1": replace(ENGINE, in_flight=4)}
    )
    found = lines(Metrics(), fleet)
    for line in (
        "gateway_switches_total 3.0",
        'gateway_requests_total{model="m"} 12.0',
        'gateway_waiting_requests{model="m"} 1.0',
        'gateway_in_flight_requests{model="m"} 4.0',
        'gateway_engines{state="ready"} 1.0',
        'gateway_engines{state="loading"} 0.0',
        'gateway_routes{state="open"} 1.0',
    ):
        assert line in found


def test_load_seconds_and_exits_are_counted_once_and_stale_ones_never() -> None:
    metrics = Metrics()
    loading = replace(FLEET, engines={"e1": replace(ENGINE, state=EngineState.LOADING)})
    metrics.count(loading, EngineReady("e1", "x:1", load_s=3.0))
    metrics.count(loading, EngineReady("gone", "x:1", load_s=99.0))
    metrics.count(loading, EngineExited("e1", "", expected=True))
    metrics.count(loading, EngineExited("gone", "", expected=True))
    found = lines(metrics)
    assert 'gateway_load_seconds_sum{model="m"} 3.0' in found
    assert 'gateway_load_seconds_count{model="m"} 1.0' in found
    assert 'gateway_engine_exits_total{expected="true",model="m"} 1.0' in found


def test_waiters_are_counted_by_class_and_decisions_by_action() -> None:
    batch = Waiter("u", "m", 0.0, 9.0, requester=Requester("k", priority=Priority.BATCH))
    fleet = replace(FLEET, waiters={"t": Waiter("t", "m", 0.0, 9.0), "u": batch})
    metrics = Metrics()
    metrics.count_decisions([Decision(1.0, Action.EVICT, "m", "because"), Decision(2.0, Action.EVICT, "n", "because")])
    found = lines(metrics, fleet)
    for line in (
        'gateway_waiting_requests_by_class{class="interactive"} 1.0',
        'gateway_waiting_requests_by_class{class="batch"} 1.0',
        'gateway_decisions_total{action="evict"} 2.0',
        'gateway_decisions_total{action="wake"} 0.0',
    ):
        assert line in found


def test_sleeps_wakes_and_doubts_are_counted() -> None:
    metrics = Metrics()
    metrics.count(FLEET, EngineAsleep("e1", 4096, 1.5))
    metrics.count(FLEET, EngineAwake("e1", 0.5))
    metrics.count(FLEET, EngineExited("e1", "", expected=False, doubt=True))
    late = replace(FLEET, engines={"e1": replace(ENGINE, stop_reason="wake-timeout")})
    metrics.count(late, EngineExited("e1", "", expected=True))
    found = lines(metrics)
    assert 'gateway_sleep_seconds_sum{model="m"} 1.5' in found
    assert 'gateway_wake_seconds_sum{model="m"} 0.5' in found
    assert 'gateway_sleep_doubts_total{model="m"} 2.0' in found
