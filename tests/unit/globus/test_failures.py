"""What the service's refusals and failed tasks mean."""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import Any

import pytest

from gateway_plugin.globus.client.sdk_transport import SdkTransport, refusal, task_failure
from gateway_plugin.globus.client.transport import Next


@pytest.mark.parametrize(
    ("status", "code", "then"),
    [
        (401, "invalid_api_key", Next.NOTHING),
        (403, "forbidden", Next.NOTHING),
        (404, "not_found", Next.NOTHING),
        (413, "prompt_too_large", Next.SMALLER),
        (422, "endpoint_unavailable", Next.NOTHING),
        (429, "rate_limited", Next.AGAIN),
        (500, "endpoint_unavailable", Next.AGAIN),
        (503, "endpoint_unavailable", Next.AGAIN),
    ],
)
def test_a_refusal_by_its_status(status: int, code: str, then: Next) -> None:
    found = refusal(status, "SOME_CODE", "its own words")
    assert (found.error.code, found.then) == (code, then)
    assert "SOME_CODE: its own words" in found.error.message


@pytest.mark.parametrize(
    ("remote", "code", "then", "words"),
    [
        ("Traceback\n globus_compute_sdk.errors.MaxResultSizeExceeded: Task result of 11MB", "result_too_large",
         Next.SMALLER, "Task result of 11MB"),
        ("parsl.executors.high_throughput.errors.WorkerLost: Task failure due to loss", "task_failed", Next.NOTHING,
         "due to loss"),
        ("Ignoring command from server\nCommand too old or skew between system clocks is too large."
         "\n  Command timestamp:  1 (long ago)\n  Endpoint timestamp: 999 (now)", "task_failed", Next.AGAIN,
         "away for too long"),
        ("Traceback:\n  File x\nValueError: no\n\n", "task_failed", Next.NOTHING, "ValueError: no"),
        ("", "task_failed", Next.NOTHING, "no reason"),
    ],
)  # fmt: skip
def test_a_failed_task_by_its_words(remote: str, code: str, then: Next, words: str) -> None:
    found = task_failure(remote)
    assert (found.error.code, found.then) == (code, then)
    assert words in found.error.message


def test_a_result_watcher_that_gave_up_is_not_asked_again() -> None:
    """The SDK's ``reload_tasks`` would give it the tasks that are still pending, and nobody would hear of them."""
    from globus_compute_sdk.sdk import executor as sdk

    client: Any = SimpleNamespace()
    transport = SdkTransport(str(uuid.uuid4()), str(uuid.uuid4()), client)
    group = uuid.uuid4()
    given_up = sdk._ResultWatcher(group, client)
    assert sdk._RESULT_WATCHERS[group] is given_up
    executor: Any = SimpleNamespace(task_group_id=group, shutdown=lambda **_: None)
    transport._executors[str(group)] = executor
    transport.release(str(group))
    assert group not in sdk._RESULT_WATCHERS
