"""Checks of a node type's job against Slurm before it is submitted. Pure: ``scheduler.py`` runs the commands.

``sbatch --test-only`` judges the script that would be submitted: partition, account and quality of service (where the
site enforces them), constraint, GPUs, cores, memory, licenses. Slurm 22.05 was seen to miss a walltime over a limit if
``EnforcePartLimits`` is off (the job pends for ever), and to call a job impossible if its nodes are all down. These two
are checked here, and whether engines get the GPUs that the site configures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gateway_plugin.errors import ConfigError
from gateway_plugin.schedulers.base import walltime_s
from gateway_plugin.schedulers.directives import Directives, slurm_directives
from gateway_plugin.schedulers.job_options import slurm_asked
from gateway_plugin.schedulers.slurm_cli import bends, on_cluster
from gateway_plugin.service.checks import Check, Verdict
from gateway_plugin.site import NodeType

NEEDED = ("sbatch", "squeue", "scontrol", "scancel", "sinfo")
"""Commands that blocks require."""

_TRY = "'gateway doctor --submit' tries it"
_AGAIN = "run 'gateway doctor' again when Slurm answers"
_POLICY = (
    "either your jobs use up a limit now and later ones are taken, or the account or qos never allows a job of this "
    "size or walltime: 'squeue --me' shows the former, 'sacctmgr show assoc' and 'show qos' the latter"
)
_UNUSABLE = ("down", "drain", "fail", "inval", "unk", "future", "maint", "power")


@dataclass(frozen=True)
class Partition:
    """A partition as Slurm describes it. ``max_s``: seconds; ``None``: no limit."""

    name: str
    up: bool
    default: bool
    max_s: float | None


@dataclass(frozen=True)
class Node:
    """A node in one partition."""

    name: str
    partition: str
    memory_mib: int
    """0 where the site has not said it."""
    gpus: int
    features: frozenset[str]
    usable: bool


@dataclass(frozen=True)
class Quality:
    """A quality of service. ``over_partition``: it overrides the partition's time limit."""

    name: str
    max_s: float | None
    over_partition: bool


@dataclass(frozen=True)
class Cluster:
    """The cluster as Slurm reports it. Empty without accounting: ``accounts``, ``qualities``."""

    partitions: tuple[Partition, ...]
    nodes: tuple[Node, ...]
    accounts: tuple[str, ...] = ()
    """This user's, each with its qualities of service: ``proj (normal, high)``."""
    qualities: tuple[Quality, ...] = ()


def partitions_argv(clusters: str | None) -> tuple[str, ...]:
    """The command that lists every partition, hidden ones too."""
    return ("scontrol", *on_cluster(clusters), "--all", "--oneliner", "show", "partition")


def nodes_argv(clusters: str | None) -> tuple[str, ...]:
    """The command that lists every node, once for each of its partitions."""
    return ("sinfo", *on_cluster(clusters), "--noheader", "--all", "--Node", "-o", "%N|%P|%m|%G|%f|%T")


def associations_argv(user: str) -> tuple[str, ...]:
    """The command that lists the accounts that a user may charge."""
    return ("sacctmgr", "-n", "-P", "show", "associations", f"user={user}", "format=account,qos")


def qualities_argv() -> tuple[str, ...]:
    """The command that lists every quality of service with its longest walltime."""
    return ("sacctmgr", "-n", "-P", "show", "qos", "format=name,maxwall,flags")


def parse_partitions(text: str) -> tuple[Partition, ...]:
    """The partitions in the output of ``partitions_argv``."""
    lines = [dict(re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S*)", line)) for line in text.splitlines()]
    return tuple(
        Partition(
            name=words["PartitionName"],
            up=words.get("State") == "UP",
            default=words.get("Default") == "YES",
            max_s=limit_s(words.get("MaxTime", "")),
        )
        for words in lines
        if "PartitionName" in words
    )


def parse_nodes(text: str) -> tuple[Node, ...]:
    """The nodes in the output of ``nodes_argv``."""
    found = []
    for line in text.splitlines():
        if line.count("|") != 5:
            continue
        name, partition, memory, gres, features, state = line.split("|")
        usable = not any(word in state.lower() for word in _UNUSABLE) and not state.endswith("*")
        memory_mib = int(memory.rstrip("+")) if memory.rstrip("+").isdigit() else 0
        labels = frozenset(features.split(","))
        found.append(
            Node(name, partition.rstrip("*"), memory_mib if memory_mib > 1 else 0, gpus_in(gres), labels, usable)
        )
    return tuple(found)


def gpus_in(gres: str) -> int:
    """How many GPUs ``gpu:a100:4(S:0-1),nvme:1`` has."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,(]+)*?:(\d+)", gres))


def parse_associations(text: str) -> tuple[str, ...]:
    """``Cluster.accounts`` from the output of ``associations_argv``."""
    rows = sorted({line.partition("|")[::2] for line in text.splitlines() if "|" in line})
    return tuple(f"{account} ({qualities.replace(',', ', ')})" if qualities else account for account, qualities in rows)


def parse_qualities(text: str) -> tuple[Quality, ...]:
    """The qualities of service in the output of ``qualities_argv``."""
    rows = (line.split("|") for line in text.splitlines() if line.count("|") == 2)
    return tuple(Quality(row[0], limit_s(row[1]), "PartitionTimeLimit" in row[2].split(",")) for row in rows)


def limit_s(text: str) -> float | None:
    """``D-HH:MM:SS``, ``HH:MM:SS``, ``MM:SS`` or minutes, in seconds; ``None`` without a limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        return None
    days, *clock = (int(part) if part else 0 for part in found.groups())
    if not found[1] and not found[4]:  # MM:SS, or minutes
        clock = [0, *clock[:2]]
    return float(((days * 24 + clock[0]) * 60 + clock[1]) * 60 + clock[2])


def judged(node_type: NodeType, cluster: Cluster, tested: tuple[bool | None, str]) -> tuple[Check, ...]:
    """Every check of one node type, each named ``TYPE: what``. ``tested``: verdict and message of
    ``sbatch --test-only``, ``None`` where it gave no verdict.

    A rejection is named by its subject; it is no error of the site if all nodes that could run the job are down, or
    if a limit is reached that other jobs use up.
    """
    asked = slurm_asked(node_type.provider)
    named = asked.value("partition")
    wanted = named.split(",") if named is not None else [each.name for each in cluster.partitions if each.default]
    partitions = [each for each in cluster.partitions if each.name in wanted]
    place = f"partition {', '.join(wanted)}" if wanted else "the site's choice of partition"
    features = set(re.findall(r"[^&]+", asked.value("constraint") or ""))
    nodes = [node for node in cluster.nodes if node.partition in wanted]
    if matching := [node for node in nodes if node.features >= features]:  # else the constraint is an expression
        nodes, place = matching, f"{place} with {'&'.join(sorted(features))}" if features else place
    usable = [node for node in nodes if node.usable]
    up = bool(usable) and any(each.up for each in partitions)
    state = (
        f"{len({node.name for node in usable})} of {len({node.name for node in nodes})} nodes of {place} can take jobs"
    )
    if any(not each.up for each in partitions):
        state += f"; {', '.join(each.name for each in partitions if not each.up)} is not up"
    fits, words = tested
    checks = []
    if fits:
        checks.append(Check(f"{node_type.name}: job", Verdict.OK, words))
    elif fits is None:
        checks.append(Check(f"{node_type.name}: job", Verdict.WARN, f"cannot be judged now: {words}", _AGAIN))
    elif "not available" in words and partitions and not up:
        checks.append(Check(f"{node_type.name}: job", Verdict.WARN, f"cannot be judged while none is up: {words}"))
    elif "accounting/qos policy" in words.lower():
        checks.append(Check(f"{node_type.name}: job", Verdict.WARN, f"cannot be judged now: {words}", _POLICY))
    else:
        what, advice = _about(words, cluster)
        checks.append(Check(f"{node_type.name}: {what}", Verdict.FAIL, f"{words}{_asks(asked, what)}", advice, True))
    if partitions:
        advice = "" if up else "jobs wait until one is up: 'sinfo -R' says why they are not"
        checks.append(Check(f"{node_type.name}: nodes up", Verdict.OK if up else Verdict.WARN, state, advice))
        walltime = _walltime(node_type, asked, partitions, cluster)
        checks = [check for check in checks if check.found != walltime.found]  # no script was made of such a walltime
        checks.append(walltime)
    return (*checks, *_memory(node_type, asked, nodes, place), *_gpus(node_type, nodes))


def _about(words: str, cluster: Cluster) -> tuple[str, str]:
    """The subject of Slurm's rejection, and the remedy."""
    said = words.lower()
    if "account" in said:
        return "account", f"account= in the site file; yours are {_some(cluster.accounts)}"
    if "qos" in said:
        return "qos", f"qos= in the site file; your accounts have {_some(cluster.accounts)}"
    if "partition" in said:
        known = [partition.name for partition in cluster.partitions]
        return "partition", f"partition= in the site file; there are {_some(known)}"
    if "node configuration" in said or "feature" in said:
        return "nodes", "GPUs, cores, memory or constraint= of the provider in the site file; 'sinfo -N -l' shows nodes"
    return "job", "correct the node type's provider in the site file"


_ASKED = {
    "account": ("account", "partition"),
    "qos": ("qos", "account"),
    "partition": ("partition",),
    "nodes": ("partition", "constraint", "gpus", "gpus-per-node", "gres", "cpus-per-task", "mem", "nodelist"),
}


def _asks(asked: Directives, what: str) -> str:
    """The option of the job that a rejection may refer to."""
    found = [f"--{name}={asked.value(name)}" for name in _ASKED.get(what, ()) if asked.value(name)]
    return f" ({' '.join(found)})" if found else ""


def _walltime(node_type: NodeType, asked: Directives, partitions: Iterable[Partition], cluster: Cluster) -> Check:
    """Check against the partition's limit, unless the quality of service overrides it, and against the latter's."""
    provider, name = node_type.provider, f"{node_type.name}: walltime"
    try:
        asked_s = walltime_s(provider) or 0
    except ConfigError as error:
        return Check(name, Verdict.FAIL, error.message, "walltime= in the site file", True)
    quality = next((each for each in cluster.qualities if each.name == asked.value("qos")), None)
    limits = [(f"quality {quality.name}", quality.max_s)] if quality is not None and quality.max_s is not None else []
    if quality is None or not quality.over_partition:
        limits += [(f"partition {each.name}", each.max_s) for each in partitions if each.max_s is not None]
    for whose, limit in limits:
        if asked_s > limit:
            # Without a partition of its own, a job goes where the site's rules route it, maybe not to the default.
            sure = asked.value("partition") is not None or not whose.startswith("partition")
            found = f"{provider.walltime} is more than {whose} allows ({_clock(limit)}): its jobs would pend for ever"
            advice = "lower walltime= in the site file"
            return Check(name, Verdict.FAIL if sure else Verdict.WARN, found, advice, configuration=sure)
    words = ", ".join(f"{whose} allows {_clock(limit)}" for whose, limit in limits) or "no limit is reported"
    return Check(name, Verdict.OK, f"{provider.walltime}; {words}")


def _memory(node_type: NodeType, asked: Directives, nodes: Sequence[Node], place: str) -> Iterable[Check]:
    """Whether a node has ``engine_memory_gib``. The job may ask Slurm for other memory, or none."""
    has_mib = max((node.memory_mib for node in nodes), default=0)
    if has_mib and node_type.engine_memory_gib * 1024 > has_mib:
        sure = asked.value("partition") is not None  # else the site may send the job to other nodes
        found = (
            f"{node_type.engine_memory_gib:g} GiB of memory for engines, and a node of {place} has {has_mib / 1024:.1f}"
        )
        advice = "lower engine_memory_gib= in the site file"
        yield Check(
            f"{node_type.name}: memory for engines", Verdict.FAIL if sure else Verdict.WARN, found, advice, sure
        )


def _gpus(node_type: NodeType, nodes: Sequence[Node]) -> Iterable[Check]:
    """Whether the job gets the GPUs that engines are configured to use."""
    gpus, name = gpus_of_job(node_type.provider.scheduler_options), f"{node_type.name}: GPUs of the job"
    if not node_type.gpus:
        return
    if gpus is None:
        found = f"gpus={node_type.gpus} for engines; how many the job asks for cannot be read from scheduler_options"
        yield Check(name, Verdict.WARN, found, _TRY)
    elif gpus == 0 and not any(node.gpus for node in nodes):
        found = f"gpus={node_type.gpus} for engines, and the job asks for none: right where they come with the node"
        yield Check(name, Verdict.WARN, found, f"else gpus_per_node= of the provider; {_TRY}")
    elif node_type.gpus > gpus:
        found = f"gpus={node_type.gpus} for engines, and the job asks for {gpus or 'none'}"
        yield Check(name, Verdict.FAIL, found, "gpus_per_node= of the provider in the site file", True)


def gpus_of_job(directives: str) -> int | None:
    """The number of GPUs on its one node that a job with these ``#SBATCH`` lines requests, by any option; ``None``: in
    a form that is not supported here. Parsl's own lines (``gpus_per_node=``, ``gres=``) are among them.

    (1) By name: ``--gpus-per-node=a100:4``, ``-G 4``. (2) Among other resources of a node:
    ``--gres=gpu:a100:4,nvme:1``, where a missing number is one. (3) Per task; the job has one task unless the lines set
    more.
    """
    said = slurm_directives(directives)
    asked = [0]
    for key in _GPU_OPTIONS:
        if (value := said.value(key)) is None:
            continue
        if key.startswith("gpus"):  # (1)
            counts = [part.rpartition(":")[2] for part in value.split(",")]
        else:  # (2)
            things = [re.split("[:=]", re.sub("^gres[:/]", "", part)) for part in value.split(",")]
            counts = [thing[-1] if thing[-1][:1].isdigit() else "1" for thing in things if thing[0] == "gpu"]
        tasks = (said.value("ntasks-per-node") or said.value("ntasks") or "1") if key.endswith("per-task") else "1"
        if key == "gpus-per-socket" or not all(count.isdigit() for count in (*counts, tasks)):
            return None
        asked.append(sum(map(int, counts)) * int(tasks))  # (3)
    return max(asked)


_GPU_OPTIONS = ("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres", "tres-per-node", "tres-per-task")


def _some(names: Iterable[str]) -> str:
    """The first few of them, in order."""
    known = sorted(names)
    return ", ".join(known[:12]) + (" ..." if len(known) > 12 else "") if known else "not reported"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600:02}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


_MEANT = re.compile(r"SBATCH_\w+|SLURM_(CLUSTERS|HINT)")
"""Variables that a person sets on purpose. The other removed ones come from modules and jobs."""


def environment(environ: Mapping[str, str]) -> Check:
    """Variables by which a user would change what ``sbatch`` submits: they are removed from the gateway's jobs and
    queries, with all similar ones."""
    name, job = "environment of sbatch", environ.get("SLURM_JOB_ID")
    found = [each for each in bends(environ) if _MEANT.fullmatch(each)]
    said, advice = [], []
    if found:
        said.append(f"{', '.join(found)}: ignored")
        advice.append("put what is meant into the site file (account=, partition=, clusters=, ...)")
    if job is not None:
        said.append(f"this shell is inside job {job}: a gateway started here ends with it")
        advice.append("start it on a login or service node")
    if said:
        return Check(name, Verdict.WARN, "; ".join(said), "; ".join(advice))
    return Check(name, Verdict.OK, "nothing in it is meant for sbatch")
