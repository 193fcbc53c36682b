"""What is shown of blocks: the ledger's word and the nodes, as one row a block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gateway_plugin.phases import BlockPhase
from serve.core.effects import CreateAgent
from serve.core.events import BlocksSeen, NodeDrainAsked, NodeFailed, SeenBlock
from serve.core.views.blocks import blocks_by_phase, blocks_view, last_queue_wait_s, next_end_s
from serve.core.views.status import types_view
from tests.support.fleets import Story, a_kind, a_model, a_policy, begin

NOW = 1000.0
JOINED = "block-cpu-0-0"


def a_block(name: str, phase: str, **fields: Any) -> SeenBlock:
    return SeenBlock(
        **{"name": name, "type": "cpu", "phase": BlockPhase(phase), "asked_at": NOW - 60, "job": "7", **fields}
    )


def rows(story: Story, ended: bool = False) -> dict[str | None, dict[str, Any]]:
    return {row["name"]: row for row in blocks_view(story.fleet, story.now, ended)}


def test_a_block_in_the_queue_has_no_node_but_a_reason_and_an_expected_start() -> None:
    story = begin(a_model("a"), nodes=())
    story.on(BlocksSeen((a_block("b1", "pending", reason="Resources", starts_at=NOW + 40),)))
    row = rows(story)["b1"]
    assert (row["state"], row["reason"], row["job"]) == ("pending", "Resources", "7")
    assert (row["node"], row["host"]) == (None, None)
    assert (row["starts_in_s"], row["ends_in_s"], row["age_s"]) == (40.0, None, 60.0)
    late = story.now + 100  # the queue's estimate passed, and nothing happened: due, not overdue
    assert blocks_view(story.fleet, late)[0]["starts_in_s"] == 0.0


def test_a_block_starts_is_idle_serves_drains_and_leaves() -> None:
    story = begin(a_model("a"))
    running = a_block(JOINED, "running", host="n1", starts_at=NOW - 10, ends_at=NOW + 3000)
    story.on(BlocksSeen((running, a_block("b2", "running"))))
    assert rows(story)["b2"]["state"] == "starting"  # its job runs, its node has not joined
    row = rows(story)[JOINED]
    assert (row["state"], row["node"], row["host"]) == ("idle", "cpu-0-0", "n1")
    assert (row["ends_in_s"], row["models"]) == (3000.0, [])
    story.ask("a")
    assert rows(story)[JOINED]["models"] == [{"model": "a", "state": "loading", "in_flight": 0}]
    story.loaded("a")
    story.seen("a", in_flight=3)
    row = rows(story)[JOINED]
    assert (row["state"], row["in_flight"], row["models"][0]["state"]) == ("serving", 3, "ready")
    story.on(NodeDrainAsked("cpu-0-0"))
    assert rows(story)[JOINED]["state"] == "draining"
    story.drained("a")
    story.exited("a", expected=True)
    assert JOINED in rows(story)  # its node is given back, its block has not ended yet
    story.on(BlocksSeen((a_block(JOINED, "cancelling", host="n1"),)))
    assert rows(story)[JOINED]["state"] == "leaving"


def test_a_block_whose_end_is_near_says_so_and_when_it_leaves() -> None:
    story = begin(a_model("a"))
    story.ask("a")
    story.loaded("a")
    block = a_block(JOINED, "running", starts_at=NOW - 1000, ends_at=story.now + 360)
    story.on(BlocksSeen((block,)))
    story.tick()
    row = rows(story)[JOINED]
    assert (row["state"], row["ends_in_s"]) == ("ending", 360.0)
    assert row["leaves_in_s"] == 330.0
    story.tick(after=300)
    assert rows(story)[JOINED]["state"] == "draining"


def test_those_that_ended_lately_are_shown_where_asked_for_the_last_one_first() -> None:
    story = begin(a_model("a"), nodes=())
    story.on(
        BlocksSeen(
            (
                a_block("b1", "failed", reason="exit code 3", ended_at=NOW - 30),
                a_block("b2", "expired", ended_at=NOW - 5),
                a_block("b3", "pending"),
            )
        )
    )
    assert list(rows(story)) == ["b3"]
    found = rows(story, ended=True)
    assert list(found) == ["b3", "b2", "b1"]
    assert (found["b1"]["state"], found["b1"]["reason"], found["b1"]["ended_s"]) == ("failed", "exit code 3", 30.0)


def test_a_node_asked_for_without_a_block_is_shown_once_and_says_what_failed() -> None:
    story = begin(a_model("a"), nodes=())
    story.ask("a")
    story.tick(5)
    (asked,) = story.ever(CreateAgent)
    row = rows(story)[None]
    assert (row["state"], row["node"], row["type"]) == ("asked", asked.node, "cpu")
    story.on(BlocksSeen((a_block("b1", "submitting", job=None),)))
    assert {name: row["state"] for name, row in rows(story).items()} == {"b1": "pending"}
    story.on(BlocksSeen(()))
    story.on(NodeFailed(asked.node, "sbatch: error: invalid account"))
    story.tick(60)
    assert rows(story)[None]["reason"] == "sbatch: error: invalid account"


def test_a_node_whose_block_the_ledger_was_not_read_of_yet_is_shown_all_the_same() -> None:
    story = begin(a_model("a"))
    row = rows(story)[JOINED]
    assert (row["state"], row["node"], row["type"]) == ("idle", "cpu-0-0", "cpu")
    assert (row["host"], row["phase"]) == ("10.0.0.1", None)


def test_types_say_how_many_run_and_wait_and_why_the_oldest_does() -> None:
    story = begin(a_model("a"), nodes=(), policy=a_policy(a_kind("cpu", most=3), a_kind("gpu", gpus=(8, 8), most=2)))
    story.on(
        BlocksSeen(
            (
                a_block("b1", "running", starts_at=NOW - 20, ends_at=NOW + 100),
                a_block("b2", "pending", asked_at=NOW - 30, reason="Priority", starts_at=NOW + 50),
                a_block("b3", "pending", asked_at=NOW - 20, reason="Resources"),
                a_block("b4", "running", asked_at=NOW - 50, starts_at=NOW - 40, ends_at=NOW + 70),
                a_block("b5", "failed", ended_at=NOW),
            )
        )
    )
    cpu, gpu = types_view(story.fleet, NOW)
    untroubled = {"trouble": None, "retry_in_s": None}
    assert cpu == {
        "type": "cpu",
        "running": 2,
        "pending": 2,
        "max": 3,
        "host_mib": 6144,
        "gpu_mib": [],
        "reason": "Priority",
        "starts_in_s": 50.0,
        **untroubled,
    }
    assert gpu == {
        "type": "gpu",
        "running": 0,
        "pending": 0,
        "max": 2,
        "host_mib": 6144,
        "gpu_mib": [8192, 8192],
        "reason": None,
        "starts_in_s": None,
        **untroubled,
    }
    counts = blocks_by_phase(story.fleet)
    assert (counts["cpu", "running"], counts["cpu", "pending"], counts["gpu", "cancelling"]) == (2, 2, 0)
    assert next_end_s(story.fleet, NOW) == {"cpu": 70.0}
    assert last_queue_wait_s(story.fleet, story.now) == {"cpu": 40.0}  # b1: asked 60 s ago, started 20 s ago


@pytest.mark.parametrize("phase", ["cancelling", "cancelled", "lost"])
def test_the_start_that_was_expected_of_a_job_that_never_ran_is_no_wait_in_the_queue(phase: str) -> None:
    ended_at = None if phase == "cancelling" else 990.0
    surplus = a_block("b2", phase, starts_at=NOW + 432000, ended_at=ended_at)  # as Slurm had thought
    story = begin(a_model("a"))
    story.on(BlocksSeen((a_block(JOINED, "running", starts_at=NOW - 40), surplus)))
    assert story.fleet.queue_wait_s == {"cpu": 20.0}
    assert last_queue_wait_s(story.fleet, story.now) == {"cpu": 20.0}
    surplus = replace(surplus, host="n1", starts_at=NOW - 10)  # it ran, and was ended
    story.on(BlocksSeen((a_block(JOINED, "running", starts_at=NOW - 40), surplus)))
    assert last_queue_wait_s(story.fleet, story.now) == {"cpu": 50.0}
