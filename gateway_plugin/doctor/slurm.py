"""What a node type asks of Slurm against what the cluster has. Pure.

What it asks for is read from its Parsl provider: the fields, and what ``scheduler_options`` say in whatever spelling
(of two that say the same thing ``sbatch`` takes the later, which is the field). Every mistake found here is one that
``sbatch`` would refuse, or worse, take and let pend for ever.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from gateway_plugin.doctor.slurm_cluster import Association, Cluster, Partition, gpus_of_job, memory_gib, number
from gateway_plugin.errors import ConfigError
from gateway_plugin.schedulers.base import walltime_s
from gateway_plugin.schedulers.directives import Directives
from gateway_plugin.schedulers.job_options import slurm_asked
from gateway_plugin.schedulers.slurm_cli import bends
from gateway_plugin.service.checks import Check, Verdict
from gateway_plugin.site import NodeType

NEEDED = ("sbatch", "squeue", "scontrol", "scancel", "sinfo")
"""Commands without which there is no block."""

_TRY = "'gateway doctor --submit' tries it"


def judged(node_type: NodeType, cluster: Cluster) -> tuple[Check, ...]:
    """Every check of one node type, each named ``TYPE: what``."""
    asked = slurm_asked(node_type.provider)
    partitions, check = _partitions(node_type, asked, cluster)
    checks = [check]
    if partitions:
        checks.append(_walltime(node_type, asked, partitions, cluster))
        checks += _nodes(node_type, asked, partitions, cluster)
    checks.append(_account(node_type, asked, partitions, cluster))
    if asked.value("qos") is not None and checks[-1].verdict is not Verdict.FAIL:  # which are yours goes by account
        checks.append(_quality(node_type, asked, partitions, cluster))
    return tuple(checks)


def _partitions(node_type: NodeType, said: Directives, cluster: Cluster) -> tuple[tuple[Partition, ...], Check]:
    name, asked = f"{node_type.name}: partition", said.value("partition")
    known = {partition.name: partition for partition in cluster.partitions}
    if asked is None:
        default = tuple(partition for partition in cluster.partitions if partition.default)
        if not default:
            return (), Check(name, Verdict.WARN, "none asked for, and Slurm has no default: the site chooses")
        return default, Check(name, Verdict.OK, f"none asked for: the default {default[0].name}, or the site chooses")
    wanted = asked.split(",")
    if unknown := [word for word in wanted if word not in known]:
        found = f"there is no partition {', '.join(unknown)}"
        return (), Check(name, Verdict.FAIL, found, f"partition= in the site file; there are {_some(known)}", True)
    if down := [word for word in wanted if not known[word].up]:
        advice = "jobs wait until it is up: ask the site, or choose another"
        return tuple(known[word] for word in wanted), Check(name, Verdict.WARN, f"{', '.join(down)} is not up", advice)
    return tuple(known[word] for word in wanted), Check(name, Verdict.OK, f"{asked} is up")


def _walltime(node_type: NodeType, said: Directives, partitions: Sequence[Partition], cluster: Cluster) -> Check:
    """Against the partition's limit, unless the quality of service goes beyond it, and against the latter's."""
    provider, name = node_type.provider, f"{node_type.name}: walltime"
    try:
        asked_s = walltime_s(provider) or 0
    except ConfigError as error:
        return Check(name, Verdict.FAIL, error.message, "walltime= in the site file", True)
    quality = next((each for each in cluster.qualities or () if each.name == said.value("qos")), None)
    limits = [(f"quality {quality.name}", quality.max_s)] if quality is not None and quality.max_s is not None else []
    if quality is None or not quality.over_partition:
        limits += [(f"partition {each.name}", each.max_s) for each in partitions if each.max_s is not None]
    for whose, limit in limits:
        if asked_s > limit:
            # Without a partition of its own a job goes where the site's rules send it, maybe not to the default.
            verdict = (
                Verdict.WARN if said.value("partition") is None and whose.startswith("partition") else Verdict.FAIL
            )
            found = f"{provider.walltime} is more than {whose} allows ({_clock(limit)}): its jobs would pend for ever"
            return Check(name, verdict, found, "lower walltime= in the site file", verdict is Verdict.FAIL)
    words = ", ".join(f"{whose} allows {_clock(limit)}" for whose, limit in limits) or "no limit is told"
    return Check(name, Verdict.OK, f"{provider.walltime}; {words}")


def _nodes(node_type: NodeType, said: Directives, partitions: Sequence[Partition], cluster: Cluster) -> Iterable[Check]:
    """Nodes that could take the job, by constraint, GPUs, cores and memory, one complaint at a time."""
    provider, name = node_type.provider, f"{node_type.name}: nodes"
    constraint, elsewhere = said.value("constraint"), said.value("partition") is None
    where = {partition.name for partition in partitions}
    nodes = [node for node in cluster.nodes if node.partition in where]
    if elsewhere and not nodes:
        return
    place = "partition " + ", ".join(sorted(where))
    if constraint is not None:
        features = constraint.split("&")
        if all(re.fullmatch(r"[\w.-]+", feature) for feature in features):
            nodes = [node for node in nodes if node.features >= set(features)]
            place += f" with {constraint}"
        else:
            yield Check(f"{node_type.name}: constraint", Verdict.WARN, f"{constraint} cannot be checked here")
    verdict = Verdict.WARN if elsewhere else Verdict.FAIL  # the site may send it to other nodes
    if not nodes:
        yield Check(name, verdict, f"{place} has no nodes", "partition= or constraint= in the site file", not elsewhere)
        return
    gpus = gpus_of_job(provider.scheduler_options)
    listed = max(node.gpus for node in nodes)
    cores = provider.cores_per_node or number(said.value("cpus-per-task"))
    memory = provider.mem_per_node or memory_gib(provider.scheduler_options)
    for what, asked, has in (
        ("GPUs", gpus or 0, listed),
        ("cores", cores, max(node.cores for node in nodes)),
        ("GiB of memory", int(memory), max(node.memory_mib for node in nodes) // 1024),
        ("GiB of memory for engines", int(node_type.engine_memory_gib), max(n.memory_mib for n in nodes) // 1024),
    ):
        if asked > has:
            found = f"{asked} {what} asked for, and a node of {place} has {has}"
            yield Check(name, verdict, found, "correct the node type in the site file", not elsewhere)
            return
    if gpus is None and node_type.gpus:
        found = f"gpus={node_type.gpus} for engines; how many the job asks for cannot be read from scheduler_options"
        yield Check(f"{node_type.name}: GPUs of the job", Verdict.WARN, found, _TRY)
    elif gpus == 0 and node_type.gpus and not listed:
        found = f"the job asks for no GPU, and nodes of {place} list none: where they come with the node this is right"
        yield Check(f"{node_type.name}: GPUs of the job", Verdict.WARN, found, _TRY)
    elif gpus is not None and node_type.gpus > gpus:
        found = f"gpus={node_type.gpus} for engines, and the job asks for {gpus}"
        yield Check(name, Verdict.FAIL, found, "gpus_per_node= of the provider in the site file", True)
        return
    usable = {node.name for node in nodes if node.usable}
    words = f"{len(usable)} of {len({node.name for node in nodes})} nodes of {place} can take jobs"
    if not usable:
        yield Check(name, Verdict.WARN, words, "jobs wait until one is up: 'sinfo -R' says why they are not")
    else:
        yield Check(name, Verdict.OK, words)


def _account(node_type: NodeType, said: Directives, partitions: Sequence[Partition], cluster: Cluster) -> Check:
    name, asked = f"{node_type.name}: account", said.value("account")
    words = "your default account" if asked is None else asked
    if cluster.associations is None:
        return Check(name, Verdict.WARN, f"{words}: cannot be checked, there is no accounting to ask", _TRY)
    if not cluster.associations:
        return Check(name, Verdict.WARN, f"{words}: accounting names no account of yours", _TRY)
    own = {each.account for each in _usable(cluster, partitions)}
    if asked is not None and asked not in own:
        found = f"{asked} is not an account of yours{_in(partitions)}"
        return Check(name, Verdict.FAIL, found, f"account= in the site file; yours are {_some(own)}", True)
    for partition in partitions:
        if asked is not None and partition.accounts is not None and asked not in partition.accounts:
            found = f"partition {partition.name} is closed to {asked}"
            return Check(name, Verdict.FAIL, found, f"it is open to {_some(partition.accounts)}", True)
    return Check(name, Verdict.OK, words)


def _quality(node_type: NodeType, said: Directives, partitions: Sequence[Partition], cluster: Cluster) -> Check:
    name, asked, account = f"{node_type.name}: qos", said.value("qos"), said.value("account")
    if not cluster.associations:
        return Check(name, Verdict.WARN, f"{asked}: cannot be checked, there is no accounting to ask", _TRY)
    own = [each for each in _usable(cluster, partitions) if account in (None, each.account)]
    allowed = {quality for each in own for quality in each.qualities}
    if asked not in allowed:
        found = f"{asked} is not for you{'' if account is None else f' with account {account}'}"
        return Check(name, Verdict.FAIL, found, f"qos= in the site file; there are {_some(allowed)}", True)
    for partition in partitions:
        if partition.qualities is not None and asked not in partition.qualities:
            found = f"partition {partition.name} does not take {asked}"
            return Check(name, Verdict.FAIL, found, f"it takes {_some(partition.qualities)}", True)
    return Check(name, Verdict.OK, str(asked))


def _usable(cluster: Cluster, partitions: Sequence[Partition]) -> list[Association]:
    names = {partition.name for partition in partitions}
    return [each for each in cluster.associations or () if each.partition is None or each.partition in names]


def _in(partitions: Sequence[Partition]) -> str:
    return f" in partition {', '.join(each.name for each in partitions)}" if partitions else ""


def _some(names: Iterable[str]) -> str:
    """A few of them, in order."""
    known = sorted(names)
    return ", ".join(known[:12]) + (" ..." if len(known) > 12 else "") if known else "none"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600:02}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


_MEANT = re.compile(r"SBATCH_\w+|SLURM_(CLUSTERS|HINT)")
"""What somebody set in the belief that it counts. The rest of what is kept away is the modules' and the jobs' own."""


def environment(environ: Mapping[str, str]) -> Check:
    """Variables by which a user would change what ``sbatch`` submits: neither the gateway's jobs nor its questions ever
    see them, nor anything else of that kind."""
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
