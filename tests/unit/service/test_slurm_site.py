"""What a node type asks of a cluster, against what Slurm says it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider

from gateway_plugin.doctor import slurm as words
from gateway_plugin.doctor.scheduler import _tested
from gateway_plugin.doctor.slurm import environment, judged
from gateway_plugin.paths import Layout
from gateway_plugin.service.checks import Verdict
from gateway_plugin.site import NodeType

PARTITIONS = """\
PartitionName=gpu AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=YES MaxTime=2-00:00:00 State=UP TotalNodes=2
PartitionName=closed AllowAccounts=other,more AllowQos=high Default=NO MaxTime=UNLIMITED State=UP
PartitionName=old AllowAccounts=ALL AllowQos=ALL Default=NO MaxTime=04:00:00 State=DOWN
"""
NODES = """\
n1|gpu*|256000|gpu:a100:4(S:0-1),nvme:1|a100,hbm40g|mixed
n2|gpu*|128000|gpu:a100:4|a100,hbm80g|drained
n2|old|128000|gpu:a100:4|a100,hbm80g|drained
n4|old|128000+|gpu:a100:4|a100,hbm80g|idle
n3|closed|1|(null)|(null)|idle
"""
CLUSTER = words.Cluster(
    partitions=words.parse_partitions(PARTITIONS),
    nodes=words.parse_nodes(NODES),
    accounts=words.parse_associations("proj|normal,high\nmore|normal\nmore|normal\nbare|\n"),
    qualities=words.parse_qualities("normal||\nhigh|1-00:00:00|DenyOnLimit\nlong|7-00:00:00|PartitionTimeLimit\n"),
)
TAKEN = (True, "to start at 2026-11-26T12:28:12 using 2 processors on nodes n1 in partition gpu")
NOT_AVAILABLE = "Requested node configuration is not available"


def node_type(gpus: int = 4, engine_memory_gib: float = 0.0, **options: Any) -> NodeType:
    known = {"partition": "gpu", "account": "proj", "walltime": "24:00:00", "gpus_per_node": 4, "cores_per_node": 64}
    provider = SlurmProvider(**{"launcher": SimpleLauncher(), **known, **options})
    return NodeType(
        name="big",
        provider=provider,
        cpus=64,
        gpus=gpus,
        gpu_memory_gib=38.0 if gpus else 0.0,
        engine_memory_gib=engine_memory_gib or (0.0 if gpus else 1.0),
    )


def complaints(found: NodeType, tested: tuple[bool | None, str] = TAKEN) -> dict[str, tuple[Verdict, str]]:
    checks = judged(found, CLUSTER, tested)
    return {c.name.removeprefix("big: "): (c.verdict, c.found) for c in checks if c.verdict is not Verdict.OK}


@pytest.mark.process
def test_a_good_one_has_nothing_to_complain_of() -> None:
    assert complaints(node_type()) == {}
    assert [check.found for check in judged(node_type(qos="high"), CLUSTER, TAKEN)] == [
        TAKEN[1],
        "1 of 2 nodes of partition gpu can take jobs",
        "24:00:00; quality high allows 24:00:00, partition gpu allows 48:00:00",
    ]


@pytest.mark.process
@pytest.mark.parametrize(
    ("options", "words", "what", "found", "advice"),
    [
        ({"partition": "gpus"}, "invalid partition specified: gpus", "partition", "gpus", "there are closed, gpu, old"),
        ({"account": "x"}, "Invalid account or account/partition combination specified", "account", "--account=x",
         "yours are bare, more (normal), proj (normal, high)"),
        ({"qos": "gold"}, "Invalid qos specification", "qos", "--qos=gold --account=proj", "proj (normal, high)"),
        ({"gpus_per_node": 8}, NOT_AVAILABLE, "nodes", "--partition=gpu --gpus-per-node=8", "GPUs, cores, memory"),
        ({"constraint": "h100"}, "Invalid feature specification", "nodes", "--constraint=h100", "sinfo"),
        ({}, "Invalid license specification", "job", "license", "provider in the site file"),
    ],
)  # fmt: skip
def test_a_refusal_is_named_by_what_it_is_about(
    options: dict[str, Any], words: str, what: str, found: str, advice: str
) -> None:
    (wrong,) = [c for c in judged(node_type(**options), CLUSTER, (False, words)) if c.verdict is Verdict.FAIL]
    assert wrong.name == f"big: {what}"
    assert wrong.found.startswith(words)
    assert found in wrong.found
    assert advice in wrong.advice


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"partition": "old", "walltime": "01:00:00"}, "1 of 2 nodes of partition old can take jobs; old is not up"),
        ({"constraint": "hbm80g"}, "0 of 1 nodes of partition gpu with hbm80g can take jobs"),
    ],
)
@pytest.mark.process
def test_where_nothing_is_up_slurms_refusal_is_no_mistake_of_the_sites(options: dict[str, Any], said: str) -> None:
    found = complaints(node_type(**options), (False, NOT_AVAILABLE))
    assert found == {
        "job": (Verdict.WARN, f"cannot be judged while none is up: {NOT_AVAILABLE}"),
        "nodes up": (Verdict.WARN, said),
    }


DRAINED = "Required partition not available (inactive or drain)"
POLICY = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


@pytest.mark.parametrize(
    ("partition", "tested", "found", "advice"),
    [
        ("old", (False, DRAINED), f"cannot be judged while none is up: {DRAINED}", ""),
        ("gpu", (False, POLICY), f"cannot be judged now: {POLICY}", "use up a limit now"),
        ("gpu", (False, POLICY), f"cannot be judged now: {POLICY}", "never allows a job of this size"),
        ("gpu", (None, "sbatch gave no answer within 30 s"), "cannot be judged now: sbatch gave no answer", "again"),
    ],
)
@pytest.mark.process
def test_what_may_be_otherwise_tomorrow_is_no_mistake_of_the_sites(
    partition: str, tested: tuple[bool | None, str], found: str, advice: str
) -> None:
    checks = judged(node_type(partition=partition, walltime="01:00:00"), CLUSTER, tested)
    assert not [check for check in checks if check.verdict is Verdict.FAIL]
    (job,) = [check for check in checks if check.name == "big: job"]
    assert job.found.startswith(found)
    assert advice in job.advice


@pytest.mark.process
def test_a_partition_that_is_not_available_though_it_is_up_is_a_mistake() -> None:
    assert complaints(node_type(), (False, DRAINED))["partition"][0] is Verdict.FAIL


@pytest.mark.parametrize(
    ("options", "what", "verdict", "said"),
    [
        ({"walltime": "72:00:00"}, "walltime", Verdict.FAIL, "72:00:00 is more than partition gpu allows (48:00:00)"),
        ({"walltime": "1-00:00:00"}, "walltime", Verdict.FAIL, "expected hours, minutes and seconds"),
        ({"walltime": "30:00:00", "qos": "high"}, "walltime", Verdict.FAIL, "more than quality high allows (24:00:00)"),
        ({"walltime": "72:00:00", "partition": None}, "walltime", Verdict.WARN, "more than partition gpu allows"),
        ({"gpus_per_node": 2}, "GPUs of the job", Verdict.FAIL, "gpus=4 for engines, and the job asks for 2"),
        ({"gpus_per_node": None, "gres": "gpu:a100:2"}, "GPUs of the job", Verdict.FAIL, "the job asks for 2"),
        ({"gpus_per_node": None}, "GPUs of the job", Verdict.FAIL, "gpus=4 for engines, and the job asks for none"),
        ({"gpus_per_node": None, "partition": "closed"}, "GPUs of the job", Verdict.WARN, "they come with the node"),
        ({"engine_memory_gib": 300.0}, "memory for engines", Verdict.FAIL, "300 GiB of memory for engines, and a node"),
        (
            {"engine_memory_gib": 300.0, "partition": None},
            "memory for engines",
            Verdict.WARN,
            "partition gpu has 250.0",
        ),
        ({"engine_memory_gib": 300.0, "constraint": "hbm40g"}, "memory for engines", Verdict.FAIL, "hbm40g has 250.0"),
    ],
)
@pytest.mark.process
def test_what_slurm_takes_and_no_block_could_use_is_named(
    options: dict[str, Any], what: str, verdict: Verdict, said: str
) -> None:
    found = complaints(node_type(**options))
    assert list(found) == [what]
    assert found[what][0] is verdict
    assert said in found[what][1]


@pytest.mark.process
def test_memory_that_the_site_has_not_said_forbids_nothing() -> None:
    assert complaints(node_type(partition="closed", engine_memory_gib=300.0)) == {}


@pytest.mark.process
def test_a_walltime_that_cannot_be_read_is_one_mistake(tmp_path: Path) -> None:
    wrong = node_type(walltime="1-00:00:00")
    assert list(complaints(wrong, _tested(wrong, Layout(tmp_path)))) == ["walltime"]


@pytest.mark.process
def test_a_quality_may_go_beyond_its_partition() -> None:
    assert complaints(node_type(walltime="96:00:00", qos="long")) == {}
    assert "walltime" in complaints(node_type(walltime="169:00:00", qos="long"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("UNLIMITED", None), ("", None), ("2-00:00:00", 172800), ("1-12", 129600), ("04:00:00", 14400), ("30:00", 1800),
     ("60", 3600)],
)  # fmt: skip
def test_time_limits(text: str, expected: float | None) -> None:
    assert words.limit_s(text) == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("", 0),
        ("#SBATCH --exclusive\n#SBATCH --gpus-per-node=4", 4),
        ("#SBATCH --gpus-per-node=a100:4", 4),
        ("#SBATCH --gpus=a100:2,h100:2", 4),
        ("#SBATCH --gpus 3", 3),
        ("#SBATCH -G 2", 2),
        ("#SBATCH -Ga100:2", 2),
        ("#SBATCH --gpus-per-task=2", 2),
        ("#SBATCH --gres=gpu:a100:4,nvme:1", 4),
        ("#SBATCH --mem=1g --gres='gpu:4' # all of them", 4),
        ("#SBATCH --gres=gpu", 1),
        ("#SBATCH --gres=gpu:a100", 1),
        ("#SBATCH --gres=nvme:1", 0),
        ("#SBATCH --tres-per-node=gres/gpu:2", 2),
        ("#SBATCH --gres=gres:gpu:2", 2),
        ("#SBATCH --tres-per-task=cpu=8,gres/gpu:a100=1", 1),
        ("#SBATCH --gres=gpu:a100_3g.20gb:1", 1),
        ("#SBATCH -G A100:4 --mem=128g", 4),
        ("# SBATCH --gpus=4\n##SBATCH --gpus=4", 0),
        ("#SBATCH --gpu-bind=none\n#SBATCH --gpu-freq=high", 0),
        ("#SBATCH --gpus-per-socket=2", None),
        ("#SBATCH -C gpu -G2", 2),
        ("#SBATCH --gres gpu:1 --gpus-per-node=1", 1),
        ("#SBATCH --gpus-per-n 4", 4),
        ("#SBATCH --gpus=8\n#SBATCH --gpus=4", 4),
        ("#SBATCH --ntasks-per-node=4 --gpus-per-task=1", 4),
        ("#SBATCH --gpus-per-node=$MANY", None),
    ],
)
def test_gpus_of_a_job_by_whichever_option_it_asks(lines: str, expected: int | None) -> None:
    assert words.gpus_of_job(lines) == expected


@pytest.mark.process
def test_gpus_asked_for_in_the_scheduler_s_own_words_are_gpus() -> None:
    own: dict[str, Any] = {"gpus_per_node": None, "scheduler_options": "#SBATCH --gpus-per-node=a100:4"}
    assert complaints(node_type(**own)) == {}
    own["scheduler_options"] = "#SBATCH --gpus-per-socket=2"
    assert complaints(node_type(**own))["GPUs of the job"][0] is Verdict.WARN


@pytest.mark.process
def test_a_partition_in_the_options_is_the_one_that_is_looked_at() -> None:
    found = complaints(node_type(partition=None, scheduler_options="#SBATCH -p old"))
    assert found["walltime"][1] == "24:00:00 is more than partition old allows (04:00:00): its jobs would pend for ever"


def test_nodes_that_do_not_answer_take_no_jobs() -> None:
    states = ("idle", "mixed", "allocated", "idle*", "down", "drained", "inval", "reserved")
    nodes = words.parse_nodes("\n".join(f"n|p|1|(null)|(null)|{state}" for state in states))
    assert [node.usable for node in nodes] == [True, True, True, False, False, False, False, True]


@pytest.mark.parametrize(
    ("gres", "expected"),
    [("(null)", 0), ("gpu:a100:4(S:0-1),nvme:1", 4), ("nvme:1,gpu:2", 2), ("gpu:a:1(S:0),gpu:b:2", 3), ("gpumem:8", 0)],
)
def test_gpus_of_a_node(gres: str, expected: int) -> None:
    assert words.gpus_in(gres) == expected


def test_variables_meant_for_sbatch_are_named_as_what_they_are_to_us_ignored() -> None:
    assert (
        environment({"SQUEUE_FORMAT": "%i", "SLURM_CONF": "/etc/slurm.conf", "SLURM_ROOT": "/opt"}).verdict
        is Verdict.OK
    )
    bent = environment({"SBATCH_PARTITION": "x", "SBATCH_TIMELIMIT": "1"})
    assert (bent.verdict, bent.found) == (Verdict.WARN, "SBATCH_PARTITION, SBATCH_TIMELIMIT: ignored")
    assert environment({"SLURM_CLUSTERS": "big"}).found == "SLURM_CLUSTERS: ignored"
    assert "clusters=" in environment({"SLURM_CLUSTERS": "big"}).advice
    inside = environment({"SLURM_JOB_ID": "17", "SLURM_NNODES": "1", "SBATCH_ACCOUNT": "a"})
    assert inside.found == "SBATCH_ACCOUNT: ignored; this shell is inside job 17: a gateway started here ends with it"
