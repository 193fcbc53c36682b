"""What waiters and people are told while a model waits for a node."""

from __future__ import annotations

from typing import Any

import pytest

from gateway_plugin.errors import WaitDeadline
from serve.core import events as ev
from serve.core.forecast import eta_s, model_state, waiting_reason
from serve.core.views.status import model_view, nodes_view
from tests.support.fleets import Story, a_block, a_kind, a_model, a_policy, begin

NODE = "cpu-1-1"


def waiting(*blocks: ev.SeenBlock, **fields: Any) -> Story:
    """A request waits for a model, and a node was asked for at 1000."""
    story = begin(a_model("a"), policy=a_policy(a_kind(most=2), load_guess_s=7.0, **fields), nodes=())
    story.ask("a", wait_s=100.0)
    story.blocks(*blocks)
    return story


def pending(**fields: Any) -> ev.SeenBlock:
    return a_block(NODE, **{"phase": "pending", "starts": None, "asked_at": 1000.0, **fields})


def started(took: float) -> ev.SeenBlock:
    """One of that type that started some time ago."""
    return a_block("cpu-0-9", 500.0, phase="completed", asked_at=500.0 - took, ended_at=700.0)


@pytest.mark.parametrize(
    ("blocks", "eta", "reason"),
    [
        ((), None, "a job for a cpu node is about to be submitted"),
        ((started(20),), 20 + 30 + 7, "a job for a cpu node is about to be submitted"),
        ((pending(phase="submitting", job=None),), None, "a job for a cpu node is being submitted"),
        ((pending(),), None, "job 123 waits in the queue"),
        ((pending(reason="Resources"),), None, "job 123 waits: Resources"),
        ((pending(reason="Priority"), started(20)), 20 + 30 + 7, "job 123 waits: Priority"),
        (
            (pending(reason="Resources", starts=1040.0), started(20)),
            40 + 30 + 7,
            "job 123 waits: Resources, expected to start in 40 s",
        ),
        ((pending(starts=900.0),), 30 + 7, "job 123 waits in the queue, expected to start in 0 s"),
        (
            (a_block(NODE, 990.0, host="n3"),),
            20 + 7,
            "job 123 has started on n3, its node is expected to join in 20 s",
        ),
        ((a_block(NODE, 100.0),), 1 + 7, "job 123 has started, its node is expected to join in 1 s"),
        (
            (pending(reason="Resources", starts=1400.0), a_block("cpu-1-7", 995.0, job="124")),
            25 + 7,
            "job 124 has started, its node is expected to join in 25 s",
        ),
        ((pending(phase="cancelling"),), None, "a job for a cpu node is about to be submitted"),
        (
            (pending(phase="cancelling"), a_block("cpu-0-7", phase="cancelling", job="7"), started(20)),
            None,
            "a job for a cpu node waits for block-cpu-0-7 (job 7) to end",
        ),
        (
            (a_block("cpu-0-7", phase="cancelling", job=None), pending()),
            20 + 30 + 7,  # as long as the one that leaves had waited
            "job 123 waits in the queue",
        ),
        (
            (pending(phase="submitting", job=None, reason="TimeoutError: no answer"),),
            None,
            "a job for a cpu node is being submitted: TimeoutError: no answer",
        ),
    ],
)
def test_what_a_waiter_is_told_of_the_queue(
    blocks: tuple[ev.SeenBlock, ...], eta: float | None, reason: str | None
) -> None:
    story = waiting(*blocks)
    assert model_state(story.fleet, "a") == "queued"
    assert eta_s(story.fleet, "a", story.now) == eta
    assert waiting_reason(story.fleet, "a", story.now) == reason
    assert model_view(story.fleet, "a", story.now)["reason"] == reason


def test_a_wait_that_is_longer_than_those_lately_is_expected_to_end_at_once() -> None:
    story = waiting(pending(), started(20))
    assert eta_s(story.fleet, "a", story.now + 500) == 30 + 7


def test_a_wait_that_ends_says_what_was_waited_for() -> None:
    story = waiting(pending(reason="Resources", starts=1140.0))
    story.tick(100)
    error = story.answers()["t1"].error
    assert isinstance(error, WaitDeadline)
    assert "(state: queued; job 123 waits: Resources, expected to start in 40 s)" in str(error)
    assert (error.state, error.eta_s, error.retry_after_s) == ("queued", 77.0, 77.0)
    assert error.reason == "job 123 waits: Resources, expected to start in 40 s"


def test_a_node_that_cannot_be_had_says_why() -> None:
    story = waiting()
    story.on(ev.NodeFailed(NODE, "no such partition."))
    assert model_state(story.fleet, "a") == "queued"
    assert waiting_reason(story.fleet, "a", story.now, detail=True) == (
        "no cpu node can be had: no such partition, tried again in 2 s"
    )
    assert waiting_reason(story.fleet, "a", story.now) == "no cpu node can be had, tried again in 2 s"


def test_a_model_nobody_wants_is_told_as_long_as_the_queue_took_lately() -> None:
    story = begin(a_model("a"), policy=a_policy(a_kind(), load_guess_s=7.0), nodes=())
    assert eta_s(story.fleet, "a", story.now) is None
    story.blocks(started(20))
    assert eta_s(story.fleet, "a", story.now) == 20 + 30 + 7
    assert model_state(story.fleet, "a") == "cold"
    assert waiting_reason(story.fleet, "a", story.now) is None


def test_free_room_here_comes_before_a_node_that_is_asked_for() -> None:
    story = begin(a_model("a"), policy=a_policy(a_kind(most=2), load_guess_s=7.0))
    story.blocks(pending(starts=2000.0))
    assert eta_s(story.fleet, "a", story.now) == 7.0


def test_a_pinned_model_without_a_node_is_queued() -> None:
    story = begin(a_model("a", pinned=True), policy=a_policy(a_kind()), nodes=())
    story.blocks(pending(reason="Priority"))
    assert model_state(story.fleet, "a") == "queued"
    assert waiting_reason(story.fleet, "a", story.now) == "job 123 waits: Priority"


def test_a_failed_load_is_told_rather_than_the_queue() -> None:
    story = begin(a_model("a"), policy=a_policy(a_kind(most=2)))
    story.ask("a")
    story.exited("a", "exit code 1: boom")
    assert model_view(story.fleet, "a", story.now, detail=True)["reason"] == "exit code 1: boom"


# --- nodes ---
def test_a_node_shows_its_block() -> None:
    story = waiting(pending(reason="Resources", starts=1040.0))
    (row,) = nodes_view(story.fleet, story.now)
    assert (row["job"], row["reason"], row["starts_in_s"], row["ends_in_s"]) == ("123", "Resources", 40.0, None)
    story.blocks(a_block(NODE, 1000.0, 4600.0, host="n3"))
    story.join(NODE)
    (row,) = nodes_view(story.fleet, story.now)
    assert (row["job"], row["host"], row["starts_in_s"], row["reason"]) == ("123", "n3", None, None)
    assert (row["ends_in_s"], row["leaves_in_s"], row["ending"]) == (3600.0, 3570.0, False)


def test_pending_nodes_and_blocks_are_matched_in_the_order_of_asking() -> None:
    story = begin(a_model("a"), policy=a_policy(a_kind(least=2, most=2)), nodes=())
    story.blocks(pending(job="8", asked_at=1002.0), a_block("cpu-1-2", None, phase="pending", asked_at=1001.0, job="7"))
    assert [row["job"] for row in nodes_view(story.fleet, story.now)] == ["7", "8"]
    story.join("cpu-1-2")
    assert {row["id"]: row["job"] for row in nodes_view(story.fleet, story.now)} == {"cpu-1-1": "8", "cpu-1-2": "7"}
