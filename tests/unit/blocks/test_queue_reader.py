"""One look at a cluster's queue serves all its node types; one silence, too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from parsl.launchers import SimpleLauncher
from parsl.providers import PBSProProvider, SlurmProvider

from gateway_plugin.paths import Layout
from gateway_plugin.schedulers.base import SchedulerSilent
from gateway_plugin.schedulers.queue import SHARED_S, QueueReader, QueueScheduler, Rows
from gateway_plugin.schedulers.select import schedulers_for
from gateway_plugin.site import NodeType


class Cluster:
    """Commands run on it, and its clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.asked: list[frozenset[str]] = []
        self.away = False
        self.reader = QueueReader(self.read, lambda: self.now)

    def read(self, numbers: frozenset[str]) -> Rows:
        self.asked.append(numbers)
        if self.away:
            self.now += 18  # its commands give up
            raise SchedulerSilent("squeue: no answer")
        return {number: SimpleNamespace(id=number) for number in numbers}

    def round(self) -> list[bool]:
        """Every node type polls, as the monitor does: which of them got an answer."""
        answers = []
        for number in ("1", "2", "3"):
            try:
                answers.append(number in self.reader.rows(f"type{number}", [number]))
            except SchedulerSilent:
                answers.append(False)
        return answers


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster()
    assert made.round() == [True] * 3  # each asks for jobs that no other knows of
    made.asked.clear()
    made.now += 2
    return made


def test_a_round_of_polls_costs_one_command(cluster: Cluster) -> None:
    for _ in range(4):
        assert cluster.round() == [True] * 3
        cluster.now += 2
    assert cluster.asked == [frozenset("123")] * 4


def test_a_silent_scheduler_costs_one_timeout_a_round(cluster: Cluster) -> None:
    cluster.away = True
    before = cluster.now
    assert cluster.round() == [False] * 3
    assert cluster.now == before + 18
    cluster.away = False
    assert cluster.round() == [False] * 3, "it is left alone for a moment"
    cluster.now += SHARED_S
    assert cluster.round() == [True] * 3


def test_no_node_type_gets_the_same_answer_twice(cluster: Cluster) -> None:
    for _ in range(3):  # at the same instant
        cluster.reader.rows("type1", ["1"])
    assert len(cluster.asked) == 3


def test_an_answer_from_before_a_job_was_there_says_nothing_of_it(cluster: Cluster) -> None:
    cluster.reader.rows("type1", ["1"])
    assert "9" in cluster.reader.rows("type2", ["2", "9"])
    assert len(cluster.asked) == 2


def test_an_old_answer_is_not_shared(cluster: Cluster) -> None:
    cluster.reader.rows("type1", ["1"])
    cluster.now += SHARED_S
    cluster.reader.rows("type2", ["2"])
    assert len(cluster.asked) == 2


@pytest.mark.process
def test_node_types_of_one_cluster_share_a_reader(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "state")
    layout.make()

    def node_type(name: str, kind: Any, **options: Any) -> NodeType:
        return NodeType(name=name, provider=kind(launcher=SimpleLauncher(), **options), cpus=1, engine_memory_gib=1)

    made = schedulers_for(
        [
            node_type("a", SlurmProvider),
            node_type("b", SlurmProvider, partition="big"),
            node_type("c", SlurmProvider, clusters="other"),
            node_type("d", PBSProProvider),
        ],
        layout,
    )
    readers = [scheduler.reader for scheduler in made.values() if isinstance(scheduler, QueueScheduler)]
    assert readers[0] is readers[1]
    assert len(set(map(id, readers))) == 3
