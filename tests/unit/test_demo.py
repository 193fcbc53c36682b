"""What the demo says of what it sees."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest

from examples.run_demo import Demo, Seen, Tally, changes, tally, when
from examples.run_demo_slurm import queue_changed
from gateway_plugin.api_types import ModelInfo, Status


def status(**more: Any) -> Status:
    model = ModelInfo("tiny", "generate", **more)
    return Status("ready", (model,), (), (), 0, 0)


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ("cold", {"state": "loading", "eta_s": 29.6}, "loading (about 30 s)"),
        ("loading", {"state": "ready"}, "ready after 27 s"),
        ("ready", {"state": "draining"}, "draining, to make room"),
        ("draining", {"state": "cold"}, "evicted"),
        ("ready", {"state": "cold"}, "evicted"),
        ("queued", {"state": "cold"}, "not loaded"),
        ("loading", {"state": "failed", "reason": "no such file"}, "failed: no such file"),
    ],
)
def test_each_change_is_said_once(before: str, now: dict[str, Any], words: str) -> None:
    found = list(changes({"tiny": Seen(before, 3.0)}, status(**now), 30.0))
    assert found == [("tiny", Seen(now["state"], 30.0), words)]
    assert list(changes({"tiny": found[0][1]}, status(**now), 31.0)) == []


def test_a_model_that_was_never_loaded_is_not_spoken_of() -> None:
    assert list(changes({}, status(state="cold"), 1.0)) == []


def test_requests_are_counted_from_the_usage_log() -> None:
    lines = [
        json.dumps({"path": "/v1/embeddings", "status": 200}),
        json.dumps({"path": "/v1/chat/completions", "status": 503}),
        json.dumps({"path": "/gateway/v1/status", "status": 200}),
        '{"path": "/v1/embe',
    ]
    assert tally(iter(lines)) == Tally(requests=2, failed=1)


@pytest.mark.parametrize(("line", "time"), [('{"time": 12.5}', 12.5), ("{", 0.0), ("[]", 0.0), ('{"time": null}', 0.0)])
def test_a_line_without_a_time_is_old(line: str, time: float) -> None:
    assert when(line) == time


@pytest.mark.parametrize(
    ("begun", "ended", "words"),
    [
        (False, None, "no gateway was started"),
        (True, None, "may still run: 'gateway --state"),
        (True, 0, "nothing of it is left running"),
        (True, 69, "'gateway down' failed (exit code 69): 'gateway --state"),
    ],
)
def test_an_interrupted_demo_says_only_what_it_knows(begun: bool, ended: int | None, words: str) -> None:
    demo = Demo()
    demo.begun, demo.ended = begun, ended
    assert words in demo.interrupted()


def test_the_end_of_the_demo_is_not_cut_off_by_any_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = Demo()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def down(*_: str, apart: bool) -> int:
        for number in before:
            os.kill(os.getpid(), number)
        return 69

    monkeypatch.setattr(demo, "gateway", down)
    assert (demo.down(), demo.ended) == (69, 69)
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_queue_is_shown_again_when_a_job_changes_and_not_because_time_passes() -> None:
    pending = "  1  gw-node-1.2.3  PENDING  0:00  1 (Resources)\n"
    running = "  1  gw-node-1.2.3  RUNNING  0:03  1 n1\n"
    assert queue_changed("", pending)
    assert queue_changed(pending, running)
    assert not queue_changed(running, running.replace("0:03", "0:04"))
    assert queue_changed(running, "")
