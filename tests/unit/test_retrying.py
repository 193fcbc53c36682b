"""When the client sends a request again."""

from __future__ import annotations

import pytest

from gateway_plugin.errors import (
    GatewayError,
    GatewayUnreachable,
    InvalidRequest,
    ModelQueueFull,
    RateLimited,
    RequestKilledEngine,
    WaitDeadline,
)
from gateway_plugin.retrying import pause_s

FULL = ModelQueueFull("m", 10, retry_after_s=5.0)


def test_the_gateway_says_when() -> None:
    assert [pause_s(FULL, repeats, 100.0, 1.0) for repeats in range(3)] == [5.0, 5.0, None]
    assert pause_s(RateLimited("a", retry_after_s=7.0), 0, 100.0, 1.0) == 7.0


def test_without_a_hint_or_with_a_very_long_one_pauses_double() -> None:
    assert [pause_s(GatewayError("broke"), repeats, 100.0, 0.0) for repeats in range(3)] == [0.5, 1.0, None]
    assert pause_s(GatewayError("broke"), 0, 100.0, 1.0) == 0.375
    assert pause_s(WaitDeadline("queued", retry_after_s=300.0), 1, 1000.0, 0.0) == 1.0
    assert pause_s(GatewayUnreachable("no", retry_after_s=5.0), 0, 100.0, 0.0) == 0.5


@pytest.mark.parametrize("left_s", [0.0, 4.9, 5.0])
def test_a_pause_that_takes_the_time_that_is_left_is_none(left_s: float) -> None:
    assert pause_s(FULL, 0, left_s, 0.0) is None


@pytest.mark.parametrize("error", [InvalidRequest("no"), RequestKilledEngine("no")])
def test_what_would_fail_again_is_not_sent_again(error: GatewayError) -> None:
    assert pause_s(error, 0, 100.0, 0.0) is None
