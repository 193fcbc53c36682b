"""Models whose weights are not on disk: refused, or fetched first; no node and no engine before that."""

from __future__ import annotations

import json

import pytest

from gateway_plugin.errors import ModelUnavailable, WaitDeadline
from serve.core import events as ev
from serve.core.effects import CreateAgent, FetchWeights, StartEngine
from serve.core.forecast import eta_s, model_state, waiting_reason
from serve.core.replay import event_from_json, event_to_json, fleet_from_json, fleet_to_json, replay
from serve.core.views.status import model_view
from serve.core.views.why import why_view
from tests.support.fleets import Story, a_kind, a_model, a_policy, begin

GIB = 2**30
MISSING = ev.WeightsMissing("m", "its weights are not here; run 'gateway models fetch m'", "not in /w")
FETCHABLE = ev.WeightsMissing("m", "its weights are not here", may_fetch=True)


def story(*events: ev.Event, node: bool = True) -> Story:
    """Models ``m`` and ``other``, and a node that has room for one of them; or nodes have to be asked for."""
    told = begin(
        a_model("m", 4), a_model("other", 4), policy=a_policy(a_kind(most=2)), nodes=("cpu-0-0",) if node else ()
    )
    for event in events:
        told.on(event)
    return told


def test_a_model_without_weights_is_refused_and_no_node_is_asked_for() -> None:
    told = story(MISSING, node=False)
    ticket = told.ask("m")
    error = told.answers()[ticket].error
    assert isinstance(error, ModelUnavailable)
    assert "run 'gateway models fetch m'" in error.message
    assert (error.state, error.retry_after_s, error.detail) == ("failed", 60.0, "not in /w")
    told.on(ev.LoadAsked("m"))
    told.on(ev.PinChanged("m", pinned=True))
    told.tick(30.0)
    assert not told.ever(CreateAgent)
    view = model_view(told.fleet, "m", told.now)
    assert (view["state"], view["reason"], view["eta_s"]) == ("failed", MISSING.reason, None)
    assert model_view(told.fleet, "m", told.now, detail=True)["reason"] == "not in /w"
    why = why_view(told.fleet, "m", told.now)
    assert "Its weights are not on disk: not in /w." in why["why"]
    assert why["would_change"] == ["'gateway models fetch m' fetches its weights."]
    told.on(ev.WeightsThere("m"))
    assert told.ever(CreateAgent), "it was asked to be loaded meanwhile"


def test_waiters_are_refused_when_the_weights_turn_out_to_be_missing() -> None:
    told = story(node=False)
    ticket = told.ask("m")
    told.on(MISSING)
    assert isinstance(told.answers()[ticket].error, ModelUnavailable)


def test_a_model_that_serves_goes_on_when_its_weights_are_removed() -> None:
    told = story()
    told.ask("m")
    told.loaded("m")
    told.on(MISSING)
    assert model_state(told.fleet, "m") == "ready"
    ticket = told.ask("m")
    assert told.answers()[ticket].error is None


def test_a_model_that_is_asked_for_is_fetched_and_then_loaded() -> None:
    told = story(FETCHABLE)
    assert not told.ever(FetchWeights), "nothing asks for it"
    assert model_state(told.fleet, "m") == "cold"
    first, second = told.ask("m"), told.ask("m", after=1.0)
    assert [effect.model.name for effect in told.ever(FetchWeights)] == ["m"]
    assert model_state(told.fleet, "m") == "fetching"
    assert eta_s(told.fleet, "m", told.now) is None
    told.on(ev.WeightsFetching("m", 3 * GIB, 15 * GIB, 0.25 * GIB))
    assert waiting_reason(told.fleet, "m", told.now) == ("its weights are being fetched: 3.0 of 15.0 GiB, 256 MiB/s")
    load_s = told.fleet.policy.load_guess_s
    assert eta_s(told.fleet, "m", told.now) == pytest.approx(48.0 + load_s)
    assert eta_s(told.fleet, "m", told.now + 40.0) == pytest.approx(8.0 + load_s)
    told.tick(20.0)
    assert not told.ever(StartEngine)
    told.on(ev.WeightsThere("m"))
    assert [effect.model.name for effect in told.ever(StartEngine)] == ["m"]
    told.loaded("m")
    assert told.answers()[first].error is None
    assert told.answers()[second].error is None


def test_who_does_not_wait_is_told_when_to_come_again_and_the_fetch_goes_on() -> None:
    told = story(FETCHABLE)
    late = told.ask("m", wait_s=1.0)
    told.on(ev.WeightsFetching("m", 3 * GIB, 15 * GIB, 0.25 * GIB))
    told.tick(2.0)
    error = told.answers()[late].error
    assert isinstance(error, WaitDeadline)
    assert error.state == "fetching"
    assert error.eta_s == pytest.approx(46.0 + told.fleet.policy.load_guess_s)
    assert "3.0 of 15.0 GiB" in str(error.reason)
    assert len(told.ever(FetchWeights)) == 1
    told.on(ev.WeightsThere("m"))
    assert model_state(told.fleet, "m") == "cold"


def test_a_fetch_that_fails_refuses_its_waiters_until_it_may_be_tried_again() -> None:
    told = story(FETCHABLE)
    ticket = told.ask("m")
    failed = ev.WeightsMissing("m", "its weights could not be fetched: the disk is full")
    told.on(failed)
    error = told.answers()[ticket].error
    assert isinstance(error, ModelUnavailable)
    assert "the disk is full" in error.message
    assert model_state(told.fleet, "m") == "failed"
    told.on(FETCHABLE)
    told.ask("m")
    assert len(told.ever(FetchWeights)) == 2


def test_others_are_not_evicted_for_a_model_without_weights() -> None:
    told = story()
    told.ask("other")
    told.loaded("other")
    told.on(FETCHABLE)
    told.ask("m")
    told.tick(120.0)
    assert model_state(told.fleet, "other") == "ready"
    assert "draining" not in {engine.state.value for engine in told.fleet.engines.values()}


def test_reports_of_unknown_models_and_other_catalogs() -> None:
    told = story(ev.WeightsMissing("nobody", "x"), ev.WeightsFetching("nobody", 1, 2), MISSING)
    assert set(told.fleet.weights) == {"m"}
    told.on(ev.CatalogChanged((a_model("m", 5), a_model("other", 4))))
    assert not told.fleet.weights, "another entry: its weights are looked for anew"


def test_a_log_with_fetches_can_be_replayed_and_one_of_before_too() -> None:
    told = story()
    lines = [json.dumps({"at": told.now, **fleet_to_json(told.fleet)})]
    for event in (FETCHABLE, ev.WeightsFetching("m", 1, 2, 0.5), ev.WeightsThere("m"), MISSING):
        assert event_from_json(event_to_json(event)) == event
        told.on(event)
        lines.append(json.dumps({"at": told.now, **event_to_json(event)}))
    assert [one.fleet for one in replay(lines)][-1] == told.fleet
    old = fleet_to_json(told.fleet)
    del old["fleet"]["weights"]
    assert fleet_from_json(old).weights == {}
