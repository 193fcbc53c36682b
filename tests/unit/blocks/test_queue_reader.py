"""One look at a cluster's queue serves all its node types; one silence, too."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from parsl.launchers import SimpleLauncher
from parsl.providers import PBSProProvider, SlurmProvider

from gateway_plugin.blocks.ledger import Block, Job
from gateway_plugin.paths import Layout
from gateway_plugin.phases import BlockPhase
from gateway_plugin.schedulers.base import SchedulerSilent
from gateway_plugin.schedulers.pbs import PbsScheduler
from gateway_plugin.schedulers.queue import QueueScheduler, run_command
from gateway_plugin.schedulers.queue_reader import SHARED_S, Answer, QueueReader
from gateway_plugin.schedulers.select import schedulers_for
from gateway_plugin.site import NodeType


class Cluster:
    """Commands run on it, and its clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.asked: list[frozenset[str]] = []
        self.away = False
        self.reader = QueueReader(self.read, lambda: self.now)

    def read(self, numbers: frozenset[str]) -> Answer:
        self.asked.append(numbers)
        if self.away:
            self.now += 18  # its commands give up
            raise SchedulerSilent("squeue: no answer")
        return Answer({number: SimpleNamespace(id=number) for number in numbers})

    def round(self) -> list[bool]:
        """Every node type polls, as the monitor does: which of them got an answer."""
        answers = []
        for number in ("1", "2", "3"):
            try:
                answers.append(number in self.reader.answer(f"type{number}", [number]).rows)
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
        cluster.reader.answer("type1", ["1"])
    assert len(cluster.asked) == 3


def test_an_answer_from_before_a_job_was_there_says_nothing_of_it(cluster: Cluster) -> None:
    cluster.reader.answer("type1", ["1"])
    assert "9" in cluster.reader.answer("type2", ["2", "9"]).rows
    assert len(cluster.asked) == 2


def test_an_old_answer_is_not_shared(cluster: Cluster) -> None:
    cluster.reader.answer("type1", ["1"])
    cluster.now += SHARED_S
    cluster.reader.answer("type2", ["2"])
    assert len(cluster.asked) == 2


def test_a_node_type_that_polls_no_more_has_its_jobs_asked_for_no_longer(cluster: Cluster) -> None:
    cluster.round()
    cluster.asked.clear()
    for _ in range(6):
        cluster.now += 10
        cluster.reader.answer("type1", ["1"])
    assert cluster.asked[0] == frozenset("123")
    assert cluster.asked[-1] == frozenset("1")


def test_a_scheduler_is_away_only_where_its_silence_took_long(cluster: Cluster) -> None:
    cluster.away = True
    cluster.round()
    assert cluster.reader.silent
    assert cluster.reader.away

    def refuses(_: frozenset[str]) -> Answer:
        raise SchedulerSilent("qstat: no permission")

    prompt = QueueReader(refuses, lambda: cluster.now)
    with pytest.raises(SchedulerSilent):
        prompt.answer("type1", ["1"])
    assert prompt.silent
    assert not prompt.away


def test_after_a_failure_that_is_no_silence_an_earlier_answer_is_not_shared(cluster: Cluster) -> None:
    cluster.reader.answer("type1", ["1"])
    asked = len(cluster.asked)
    cluster.now += 100

    def broken(_: frozenset[str]) -> Answer:
        raise RuntimeError("broken")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cluster.reader, "_read", broken)
        with pytest.raises(RuntimeError):
            cluster.reader.answer("type2", ["2"])
    cluster.reader.answer("type3", ["3"])
    assert len(cluster.asked) == asked + 1


@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EAGAIN, "temporarily unavailable"), (errno.EMFILE, "Too many open files"), (0, "denied")],
)
def test_a_command_that_cannot_be_run_is_a_silent_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    command = tmp_path / "qstat"
    command.write_text("#!/bin/sh\n")  # not executable
    if number:

        def fails(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(SchedulerSilent, match=f"qstat cannot be run: .*{said}"):
        run_command((str(command),), {}, 5.0)


PBS_JOB = """\
        "%s.server":{
            "Job_Name":"gw-%s-0123abcd.1.1",
            "job_state":"R",
            "exec_host":"node/0",
            "Resource_List":{"walltime":"24:00:00"}%s
        }"""


class Pbs:
    """Two node types of one PBS, ``a`` with job 1 and ``b`` with job 2."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        layout = Layout(tmp_path / "state")
        layout.make()
        self.ran: list[tuple[str, ...]] = []
        self.said: tuple[int, str, str] = 0, "{}", ""
        types = [
            NodeType(name=name, provider=PBSProProvider(launcher=SimpleLauncher()), cpus=1, engine_memory_gib=1)
            for name in "ab"
        ]
        made = schedulers_for(types, layout)
        self.a, self.b = (cast(PbsScheduler, made[name]) for name in "ab")
        self.of_a, self.of_b = (
            Block(
                name=f"gw-{name}-0123abcd", type=name, phase=BlockPhase.RUNNING, asked_at=time.time(),
                job=Job(id=f"{number}.server"),
            )
            for name, number in (("a", 1), ("b", 2))
        )  # fmt: skip
        monkeypatch.setattr(PbsScheduler, "run", lambda _, argv, __: self.run(argv))

    def run(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        self.ran.append(tuple(argv))
        if argv[0] == "qdel":
            return subprocess.CompletedProcess(argv, 0, "", "")
        code, out, err = self.said
        if "2" not in argv:  # the unreadable one is not asked for
            code, out, err = 0, '{\n    "Jobs":{\n' + PBS_JOB % (1, "a", "") + "\n}}", ""
        return subprocess.CompletedProcess(argv, code, out, err)


FIRST, BROKEN, ODD = PBS_JOB % (1, "a", ""), PBS_JOB % (2, "b", ',"x":007'), PBS_JOB % (2, "b", ',"Exit_status":"?"')
UNREADABLE = {
    "nothing of it": (0, '{\n    "Jobs":{\n' + FIRST + "\n}}", ""),
    "no JSON": (0, '{\n    "Jobs":{\n' + BROKEN + ",\n" + FIRST + "\n}}", ""),
    "no number": (0, '{\n    "Jobs":{\n' + FIRST + ",\n" + ODD + "\n}}", ""),
    "refused": (1, '{\n    "Jobs":{\n' + FIRST + "\n}}", "qstat: Unauthorized Request  2.server"),
}


@pytest.mark.process
@pytest.mark.parametrize("said", UNREADABLE)
def test_one_job_that_cannot_be_read_keeps_no_other_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    pbs = Pbs(tmp_path, monkeypatch)
    pbs.said = UNREADABLE[said]
    assert pbs.b.status([pbs.of_b]) == {}
    found = pbs.a.status([pbs.of_a])
    assert found[pbs.of_a.name].phase is BlockPhase.RUNNING
    pbs.b.cancel(pbs.of_b, forced=False)
    assert not [argv for argv in pbs.ran if argv[0] == "qdel"], "job 2 may be another's by now"
    pbs.a.cancel(pbs.of_a, forced=False)
    assert [argv for argv in pbs.ran if argv[0] == "qdel"] == [("qdel", "1")]


@pytest.mark.process
def test_a_search_that_may_have_missed_the_job_finds_no_absence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pbs = Pbs(tmp_path, monkeypatch)
    listed = subprocess.CompletedProcess[str](("qselect",), 0, "1.server\n2.server\n", "")
    pbs.said = UNREADABLE["nothing of it"]
    monkeypatch.setattr(PbsScheduler, "_ask", lambda *_: listed)
    assert pbs.a.find("gw-a-0123abcd") == Job(id="1.server", script=str(pbs.a._scripts / "gw-a-0123abcd.1.1"))
    with pytest.raises(SchedulerSilent, match="nothing of job 2"):
        pbs.b.find("gw-b-0123abcd")


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
