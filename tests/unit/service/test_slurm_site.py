"""What a node type asks of a cluster, against what Slurm says it has."""

from __future__ import annotations

from typing import Any

import pytest
from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider

from gateway_plugin.doctor import slurm_cluster as words
from gateway_plugin.doctor.slurm import environment, judged
from gateway_plugin.service.checks import Verdict
from gateway_plugin.site import NodeType

PARTITIONS = """\
PartitionName=gpu AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=YES MaxTime=2-00:00:00 State=UP TotalNodes=2
PartitionName=closed AllowAccounts=other,more AllowQos=high Default=NO MaxTime=UNLIMITED State=UP
PartitionName=old AllowAccounts=ALL AllowQos=ALL Default=NO MaxTime=04:00:00 State=DOWN
"""
NODES = """\
n1|gpu*|64|257000|gpu:a100:4(S:0-3)|a100,hbm40g|mixed
n2|gpu*|64|257000|gpu:a100:4(S:0-3)|a100,hbm80g|drained
n2|old|64|257000|gpu:a100:4(S:0-3)|a100,hbm80g|drained
n4|old|64|257000|gpu:a100:4(S:0-3)|a100,hbm80g|idle
n3|closed|128+|2000000|(null)|(null)|idle
"""
CLUSTER = words.Cluster(
    partitions=words.parse_partitions(PARTITIONS),
    nodes=words.parse_nodes(NODES),
    associations=words.parse_associations("proj||normal,high\nmore||normal\nnarrow|closed|normal\n"),
    qualities=words.parse_qualities("normal||\nhigh|1-00:00:00|DenyOnLimit\nlong|7-00:00:00|PartitionTimeLimit\n"),
)


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


def complaints(found: NodeType, cluster: words.Cluster = CLUSTER) -> dict[str, tuple[Verdict, str]]:
    checks = judged(found, cluster)
    return {c.name.removeprefix("big: "): (c.verdict, c.found) for c in checks if c.verdict is not Verdict.OK}


@pytest.mark.process
def test_a_good_one_has_nothing_to_complain_of() -> None:
    assert complaints(node_type()) == {}
    assert [check.found for check in judged(node_type(qos="high"), CLUSTER)] == [
        "gpu is up",
        "24:00:00; quality high allows 24:00:00, partition gpu allows 48:00:00",
        "1 of 2 nodes of partition gpu can take jobs",
        "proj",
        "high",
    ]


@pytest.mark.process
@pytest.mark.parametrize(
    ("options", "what", "verdict", "said"),
    [
        ({"partition": "gpus"}, "partition", Verdict.FAIL, "there is no partition gpus"),
        ({"partition": "old", "walltime": "01:00:00"}, "partition", Verdict.WARN, "old is not up"),
        ({"walltime": "72:00:00"}, "walltime", Verdict.FAIL, "72:00:00 is more than partition gpu allows (48:00:00)"),
        ({"walltime": "1-00:00:00"}, "walltime", Verdict.FAIL, "expected hours, minutes and seconds"),
        ({"walltime": "30:00:00", "qos": "high"}, "walltime", Verdict.FAIL, "more than quality high allows (24:00:00)"),
        ({"gpus_per_node": 8}, "nodes", Verdict.FAIL, "8 GPUs asked for, and a node of partition gpu has 4"),
        ({"cores_per_node": 128}, "nodes", Verdict.FAIL, "128 cores asked for, and a node of partition gpu has 64"),
        ({"mem_per_node": 500}, "nodes", Verdict.FAIL, "500 GiB of memory asked for"),
        ({"engine_memory_gib": 300.0}, "nodes", Verdict.FAIL, "300 GiB of memory for engines"),
        ({"gpus_per_node": 2}, "nodes", Verdict.FAIL, "gpus=4 for engines, and the job asks for 2"),
        ({"gpus_per_node": None, "gres": "gpu:a100:2"}, "nodes", Verdict.FAIL, "the job asks for 2"),
        ({"constraint": "hbm80g"}, "nodes", Verdict.WARN, "0 of 1 nodes of partition gpu with hbm80g can take jobs"),
        ({"constraint": "h100"}, "nodes", Verdict.FAIL, "partition gpu with h100 has no nodes"),
        ({"constraint": "[a|b]"}, "constraint", Verdict.WARN, "[a|b] cannot be checked here"),
        ({"account": "theirs"}, "account", Verdict.FAIL, "theirs is not an account of yours in partition gpu"),
        ({"account": "narrow"}, "account", Verdict.FAIL, "narrow is not an account of yours in partition gpu"),
        ({"qos": "gold"}, "qos", Verdict.FAIL, "gold is not for you with account proj"),
    ],
)
def test_each_mistake_is_named(options: dict[str, Any], what: str, verdict: Verdict, said: str) -> None:
    found = complaints(node_type(**options))
    assert list(found) == [what]
    assert found[what][0] is verdict
    assert said in found[what][1]


@pytest.mark.process
def test_a_partition_that_is_closed_to_an_account_and_a_quality() -> None:
    closed: dict[str, Any] = {"gpus": 0, "partition": "closed", "gpus_per_node": None, "qos": "normal"}
    assert complaints(node_type(**closed)) == {"account": (Verdict.FAIL, "partition closed is closed to proj")}
    found = complaints(node_type(**closed, account="more"))
    assert found == {"qos": (Verdict.FAIL, "partition closed does not take normal")}


@pytest.mark.process
def test_a_quality_may_go_beyond_its_partition() -> None:
    own = words.parse_associations("proj||normal,long\n")
    cluster = words.Cluster(CLUSTER.partitions, CLUSTER.nodes, own, CLUSTER.qualities)
    assert complaints(node_type(walltime="96:00:00", qos="long"), cluster) == {}
    assert "walltime" in complaints(node_type(walltime="169:00:00", qos="long"), cluster)


@pytest.mark.process
def test_where_the_site_chooses_the_partition_its_limits_are_no_verdict() -> None:
    """As on Perlmutter: a rule of the site sends a job on by its constraint and its quality of service."""
    found = complaints(node_type(partition=None, walltime="72:00:00", gpus_per_node=8))
    assert {what: verdict for what, (verdict, _) in found.items()} == {
        "walltime": Verdict.WARN,
        "nodes": Verdict.WARN,
    }


@pytest.mark.process
def test_without_accounting_it_says_that_it_cannot_tell() -> None:
    cluster = words.Cluster(CLUSTER.partitions, CLUSTER.nodes, None, None)
    found = complaints(node_type(account="any", qos="any"), cluster)
    assert {what: verdict for what, (verdict, _) in found.items()} == {"account": Verdict.WARN, "qos": Verdict.WARN}
    assert "cannot be checked" in found["account"][1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("UNLIMITED", None), ("", None), ("2-00:00:00", 172800), ("1-12", 129600), ("04:00:00", 14400), ("30:00", 1800),
     ("60", 3600)],
)  # fmt: skip
def test_time_limits(text: str, expected: float | None) -> None:
    assert words.limit_s(text) == expected


@pytest.mark.parametrize(
    ("gres", "expected"),
    [("(null)", 0), ("gpu:2", 2), ("gpu:a100:4(S:0-1)", 4), ("nvme:1,gpu:a:1,gpu:b:2", 3), ("craynetwork:4", 0)],
)
def test_gpus_of_a_node(gres: str, expected: int) -> None:
    assert words.gpus_in(gres) == expected


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
    own["scheduler_options"] = ""
    assert complaints(node_type(**own))["nodes"] == (Verdict.FAIL, "gpus=4 for engines, and the job asks for 0")


@pytest.mark.process
def test_gpus_may_come_with_the_node_where_no_node_lists_any() -> None:
    """As at TACC, whose ``sbatch`` refuses ``--gres`` and ``--gpus``."""
    plain = words.Cluster(CLUSTER.partitions, words.parse_nodes("n1|gpu*|64|257000|(null)|(null)|idle\n"), None, None)
    found = complaints(node_type(gpus_per_node=None, account=None), plain)["GPUs of the job"]
    assert found[0] is Verdict.WARN
    assert "where they come with the node this is right" in found[1]
    asked = complaints(node_type(account=None), plain)["nodes"]
    assert asked == (Verdict.FAIL, "4 GPUs asked for, and a node of partition gpu has 0")


@pytest.mark.process
@pytest.mark.parametrize(
    ("options", "what", "said"),
    [
        ("#SBATCH -A theirs", "account", "theirs is not an account of yours in partition gpu"),
        ("#SBATCH --acco theirs -q high", "account", "theirs is not an account of yours in partition gpu"),
        ("#SBATCH -A proj -q gold", "qos", "gold is not for you with account proj"),
        ("#SBATCH -A proj -C h100", "nodes", "partition gpu with h100 has no nodes"),
        ("#SBATCH -A proj -c 128", "nodes", "128 cores asked for"),
        ("#SBATCH -A proj --mem=500G", "nodes", "500 GiB of memory asked for"),
    ],
)
def test_what_the_options_ask_for_is_checked_as_what_fields_ask_for(options: str, what: str, said: str) -> None:
    found = complaints(node_type(account=None, cores_per_node=None, scheduler_options=options))
    assert list(found) == [what]
    assert said in found[what][1]


@pytest.mark.process
def test_a_partition_in_the_options_is_the_one_that_is_looked_at() -> None:
    checks = judged(node_type(partition=None, scheduler_options="#SBATCH -p old"), CLUSTER)
    assert checks[0].found == "old is not up"
    assert checks[1].found == "24:00:00 is more than partition old allows (04:00:00): its jobs would pend for ever"


def test_memory_in_the_options() -> None:
    sizes = {"8G": 8.0, "512": 0.5, "1T": 1024.0, "0": 0.0, "all": 0.0, "8GB": 8.0}
    assert {said: words.memory_gib(f"#SBATCH --mem={said}") for said in sizes} == sizes


def test_nodes_that_do_not_answer_take_no_jobs() -> None:
    states = ("idle", "mixed", "allocated", "idle*", "down", "drained", "inval", "reserved")
    nodes = words.parse_nodes("\n".join(f"n|p|1|1|(null)|(null)|{state}" for state in states))
    assert [node.usable for node in nodes] == [True, True, True, False, False, False, False, True]


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
