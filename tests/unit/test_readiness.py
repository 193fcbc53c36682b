"""Waiting for a model: looks and touches within the time that there is."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from gateway_plugin.api_types import ModelInfo
from gateway_plugin.errors import ModelUnavailable, NoRoom, WaitDeadline
from gateway_plugin.readiness import wait_until_ready


class World:
    """A model that takes these states, look by look (the last one stays); a look takes ``look_s``."""

    def __init__(self, *states: str, look_s: float = 1.0, eta_s: float | None = None) -> None:
        self.now = 1000.0
        self.look_s = look_s
        self.eta_s = eta_s
        self.budgets: list[float] = []
        self.touched: list[float] = []
        self.reported: list[ModelInfo] = []
        self.request: Future[Any] | None = None
        """What a touch leaves open."""
        self._last = states[-1]
        self._states: Iterator[str] = iter(states)

    def look(self, within_s: float) -> ModelInfo:
        self.budgets.append(within_s)
        self.now += min(self.look_s, within_s)
        return ModelInfo("m", "generate", next(self._states, self._last), eta_s=self.eta_s, reason="out of memory")

    def touch(self, model: ModelInfo, within_s: float) -> Future[Any] | None:
        self.touched.append(within_s)
        self.now += min(self.look_s, within_s)
        return self.request

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds

    def wait(self, timeout_s: float, poll_s: float = 3.0) -> ModelInfo:
        return wait_until_ready(
            self.look, self.touch, timeout_s, poll_s=poll_s, look_s=2.0, failed_s=10.0, report=self.reported.append,
            clock=lambda: self.now, sleep=self.sleep,
        )  # fmt: skip


def test_a_cold_model_is_touched_and_waited_for() -> None:
    world = World("cold", "loading", "ready")
    assert world.wait(600.0).ready
    assert world.budgets == [600.0, 600.0 - 5.0, 600.0 - 9.0]
    assert world.touched == [599.0]
    assert [found.state for found in world.reported] == ["cold", "loading"]


def test_one_that_fell_asleep_meanwhile_is_touched_again() -> None:
    world = World("asleep", "loading", "ready")
    assert world.wait(600.0).ready
    assert len(world.touched) == 1
    world = World("loading", "queued", "asleep", "loading", "ready")
    assert world.wait(600.0).ready
    assert len(world.touched) == 2


def test_demand_that_was_forgotten_is_made_again_and_a_failed_load_is_not() -> None:
    world = World("cold", "queued", "cold", "failed", "failed", "ready")
    assert world.wait(600.0).ready
    assert len(world.touched) == 2


@pytest.mark.parametrize("look_s", [0.1, 1.0, 20.0, 200.0])
@pytest.mark.parametrize("timeout_s", [0.5, 5.0, 30.0, 200.0])
def test_no_look_and_no_touch_goes_past_the_end(timeout_s: float, look_s: float) -> None:
    world = World("cold", look_s=look_s)
    with pytest.raises(WaitDeadline, match=r"'m' is cold and was not ready within") as caught:
        world.wait(timeout_s)
    assert caught.value.state == "cold"
    assert world.now <= 1000.0 + timeout_s
    assert all(0 < budget <= timeout_s for budget in (*world.budgets, *world.touched))


def test_looks_are_as_far_apart_as_the_load_is_long() -> None:
    world = World(*["loading"] * 3, "ready", eta_s=20.0)
    assert world.wait(600.0).ready
    assert world.now == pytest.approx(1000.0 + 4 * 1.0 + 1.0 + 3 * 10.0)


def test_a_model_that_goes_on_failing_is_given_up_with_its_last_words() -> None:
    with pytest.raises(ModelUnavailable, match="out of memory"):
        World("failed").wait(600.0)
    assert World("failed", "loading", "ready").wait(600.0).ready


def test_a_failure_ends_nothing_while_a_request_waits_for_the_model() -> None:
    world = World("cold", *["failed"] * 20, "ready")
    world.request = Future()
    assert world.wait(600.0).ready
    assert len(world.touched) == 1
    assert world.request.cancelled()


def test_the_error_of_the_request_that_waits_ends_the_wait_unless_the_model_is_ready() -> None:
    error = NoRoom("larger than any node")
    for states in (("queued",), ("queued", "ready")):
        world = World(*states)
        world.request = Future()
        world.request.set_exception(error)
        if states[-1] == "ready":
            assert world.wait(600.0).ready
            continue
        with pytest.raises(NoRoom, match="larger than any node"):
            world.wait(600.0)


def test_a_request_that_waits_is_cancelled_at_the_deadline_and_its_end_there_is_no_error_of_its_own() -> None:
    world = World("queued")
    world.request = Future()
    with pytest.raises(WaitDeadline, match="is queued"):
        world.wait(30.0)
    assert world.request.cancelled()


def test_the_answer_of_a_model_that_is_gone_again_has_it_asked_for_again() -> None:
    world = World("cold", "loading", "ready")
    world.request = Future()
    world.request.set_result({})
    assert world.wait(600.0).ready
    assert len(world.touched) == 2
