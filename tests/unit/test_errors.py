"""Every error knows its answer and survives the way between processes."""

from __future__ import annotations

import pickle

import pytest

from gateway_plugin import errors
from gateway_plugin.errors import (
    BodyTooLarge,
    DeadlineTooEarly,
    EngineBusy,
    GatewayError,
    ModelNotFound,
    ModelQueueFull,
    ModelUnavailable,
    Unavailable,
    WaitDeadline,
)

EVERY = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GatewayError)
]  # fmt: skip
MADE = [
    ModelNotFound("m", ("a", "b")),
    ModelQueueFull("m", 7),
    BodyTooLarge(1024),
    ModelUnavailable("it said: no CUDA", retry_after_s=12.4, state="failed", eta_s=12.4),
    DeadlineTooEarly("too late", state="cold", eta_s=60.0, retry_after_s=60.0, position=3),
    WaitDeadline("not ready", state="queued", eta_s=47.0, reason="job 7 waits: Resources", detail="sbatch: error"),
]


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_pickling_keeps_everything(error: GatewayError) -> None:
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert (twin.body(), twin.headers(), twin.__dict__) == (error.body(), error.headers(), error.__dict__)


def test_the_detail_is_in_the_body_for_administrators_alone() -> None:
    error = ModelUnavailable("The engine failed.", detail="RuntimeError: /scratch/eve")
    assert error.body()["error"]["message"] == "The engine failed."
    assert error.body(detail=True)["error"]["message"] == "The engine failed. In full: RuntimeError: /scratch/eve"
    assert "eve" not in str(error)


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in EVERY if "code" in vars(kind)]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_kind_has_a_status_and_an_exit_code_that_is_not_success(kind: type[GatewayError]) -> None:
    assert 400 <= kind.status < 600
    assert 1 <= kind.exit_code < 126


@pytest.mark.parametrize("kind", [EngineBusy, Unavailable, ModelUnavailable, WaitDeadline, DeadlineTooEarly])
def test_what_passes_by_itself_is_no_internal_error_of_the_command(kind: type[GatewayError]) -> None:
    assert kind.exit_code == 75


def test_a_503_always_says_when_to_come_back_and_carries_an_eta() -> None:
    for error in (ModelUnavailable("x"), ModelQueueFull("m", 1), ModelUnavailable("x", retry_after_s=0.1)):
        assert int(error.headers()["Retry-After"]) >= 1
        assert "eta_s" in error.body()["error"]


def test_the_form_is_openais() -> None:
    body = ModelNotFound("m").body()["error"]
    assert {"message", "type", "code", "param"} <= set(body)
