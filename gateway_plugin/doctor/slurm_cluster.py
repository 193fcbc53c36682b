"""What Slurm says of a cluster: partitions, nodes, accounts. Pure: ``site_checks.py`` runs the commands."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gateway_plugin.schedulers.directives import slurm_directives

NEEDED = ("sbatch", "squeue", "scontrol", "scancel", "sinfo")
"""Commands without which there is no block."""

_UNUSABLE = ("down", "drain", "fail", "inval", "unk", "future", "maint", "power")
_NODE_FORMAT = "%N|%P|%c|%m|%G|%f|%T"


def partitions_argv(clusters: str | None) -> tuple[str, ...]:
    """Every partition, hidden ones too."""
    return ("scontrol", *_on(clusters), "--all", "--oneliner", "show", "partition")


def nodes_argv(clusters: str | None) -> tuple[str, ...]:
    """Every node, once for each of its partitions."""
    return ("sinfo", *_on(clusters), "--noheader", "--all", "--Node", "-o", _NODE_FORMAT)


def associations_argv(user: str) -> tuple[str, ...]:
    """What accounting lets a user charge."""
    return ("sacctmgr", "-n", "-P", "show", "associations", f"user={user}", "format=account,partition,qos")


def qualities_argv() -> tuple[str, ...]:
    """Every quality of service with its longest walltime."""
    return ("sacctmgr", "-n", "-P", "show", "qos", "format=name,maxwall,flags")


def _on(clusters: str | None) -> tuple[str, ...]:
    return () if clusters is None else (f"--clusters={clusters}",)


@dataclass(frozen=True)
class Partition:
    """A partition as Slurm describes it. ``max_s`` is ``None`` without a limit, lists ``None`` where all may."""

    name: str
    up: bool
    default: bool
    max_s: float | None
    accounts: frozenset[str] | None
    qualities: frozenset[str] | None


@dataclass(frozen=True)
class Node:
    """A node in one partition."""

    name: str
    partition: str
    cores: int
    memory_mib: int
    gpus: int
    features: frozenset[str]
    usable: bool


@dataclass(frozen=True)
class Association:
    """An account that may be charged, in one partition or (``None``) any, with these qualities of service."""

    account: str
    partition: str | None
    qualities: frozenset[str]


@dataclass(frozen=True)
class Quality:
    """A quality of service. ``over_partition``: it goes beyond the partition's time limit."""

    name: str
    max_s: float | None
    over_partition: bool


@dataclass(frozen=True)
class Cluster:
    """What Slurm said. ``None``: it could not be asked."""

    partitions: tuple[Partition, ...]
    nodes: tuple[Node, ...]
    associations: tuple[Association, ...] | None
    qualities: tuple[Quality, ...] | None


def parse_partitions(text: str) -> tuple[Partition, ...]:
    """From ``partitions_argv``'s answer."""
    found = []
    for line in text.splitlines():
        words = dict(re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S*)", line))
        if "PartitionName" in words:
            found.append(
                Partition(
                    name=words["PartitionName"],
                    up=words.get("State") == "UP",
                    default=words.get("Default") == "YES",
                    max_s=limit_s(words.get("MaxTime", "")),
                    accounts=_list(words.get("AllowAccounts", "ALL")),
                    qualities=_list(words.get("AllowQos", "ALL")),
                )
            )
    return tuple(found)


def parse_nodes(text: str) -> tuple[Node, ...]:
    """From ``nodes_argv``'s answer."""
    found = []
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) == 7 and fields[2].rstrip("+").isdigit():
            name, partition, cores, memory, gres, features, state = fields
            usable = not any(word in state.lower() for word in _UNUSABLE) and not state.endswith("*")
            labels = frozenset() if features == "(null)" else frozenset(features.split(","))
            found.append(
                Node(name, partition.rstrip("*"), number(cores), number(memory), gpus_in(gres), labels, usable)
            )
    return tuple(found)


def parse_associations(text: str) -> tuple[Association, ...]:
    """From ``associations_argv``'s answer."""
    rows = (line.split("|") for line in text.splitlines() if line.count("|") == 2)
    return tuple(Association(row[0], row[1] or None, frozenset(row[2].split(",")) - {""}) for row in rows)


def parse_qualities(text: str) -> tuple[Quality, ...]:
    """From ``qualities_argv``'s answer."""
    rows = (line.split("|") for line in text.splitlines() if line.count("|") == 2)
    return tuple(Quality(row[0], limit_s(row[1]), "PartitionTimeLimit" in row[2].split(",")) for row in rows)


def limit_s(text: str) -> float | None:
    """``D-HH:MM:SS``, ``HH:MM:SS``, ``MM:SS`` or minutes, in seconds; ``None`` without a limit."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts) or not (days or "0").isdigit():
        return None
    numbers = [int(part) for part in parts]
    if days:
        numbers += [0] * (3 - len(numbers))
    elif len(numbers) == 1:
        numbers = [0, numbers[0], 0]
    hours, minutes, seconds = [0] * (3 - len(numbers)) + numbers
    return float(int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds)


def gpus_in(gres: str) -> int:
    """How many GPUs ``gpu:a100:4(S:0-1),nvme:1`` has."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,(]+)*?:(\d+)", gres))


def gpus_of_job(directives: str) -> int | None:
    """How many GPUs of its one node a job with these ``#SBATCH`` lines asks for, by whichever option; ``None``: it asks
    in a way that is not understood here. Parsl's own lines (``gpus_per_node=``, ``gres=``) are among them.

    (1) By name: ``--gpus-per-node=a100:4``, ``-G 4``. (2) Among other things of a node: ``--gres=gpu:a100:4,nvme:1``,
    where no number is one. (3) For each task; it has one unless the lines say more.
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


def memory_gib(directives: str) -> float:
    """``--mem`` of these ``#SBATCH`` lines; 0 where it is not said, and where it means all of the node."""
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", (slurm_directives(directives).value("mem") or "").upper())
    return 0.0 if found is None else int(found[1]) * {"K": 2**-20, "G": 1.0, "T": 1024.0}.get(found[2], 2**-10)


def _list(text: str) -> frozenset[str] | None:
    return None if text in ("ALL", "(null)", "") else frozenset(text.split(","))


def number(text: str | None) -> int:
    """A count; 0 for what is none."""
    digits = (text or "").rstrip("+")
    return int(digits) if digits.isdigit() else 0
