"""Checks of a site that need no job: its scheduler, its account, its folders and addresses."""

from __future__ import annotations

import os
import platform
import pwd
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path

from parsl.providers import SlurmProvider

from gateway_plugin.blocks.self_check import version
from gateway_plugin.doctor import pbs as pbs_site
from gateway_plugin.doctor import slurm as slurm_site
from gateway_plugin.errors import ConfigError
from gateway_plugin.paths import Layout
from gateway_plugin.schedulers import pbs_cli, slurm_cli
from gateway_plugin.schedulers.base import SchedulerSilent
from gateway_plugin.schedulers.queue import one_line, run_command
from gateway_plugin.schedulers.select import is_queue
from gateway_plugin.service.checks import Check, Verdict
from gateway_plugin.service.dry_run import rehearsed
from gateway_plugin.service.ray_head import head_address
from gateway_plugin.site import NodeType, Site

_TIMEOUT_S = 30.0
_SHARED = (
    *("nfs", "lustre", "gpfs", "beegfs", "ceph", "panfs", "afs", "weka", "pvfs", "orangefs", "dvs", "glusterfs"),
    "9p",
)
_MEMORY = ("tmpfs", "ramfs")


def every_site_check(layout: Layout, site: Site) -> tuple[Check, ...]:
    """All site checks. For a site with all blocks on this machine: only whether other users can reach Ray's ports."""
    queued = [node_type for node_type in site.node_types if is_queue(node_type.provider)]
    if not queued:
        return tuple(check for check in (_head(site),) if check.verdict is Verdict.WARN)  # loopback is sufficient
    slurm = [node_type for node_type in queued if isinstance(node_type.provider, SlurmProvider)]
    pbs = [node_type for node_type in queued if node_type not in slurm]
    return (
        Check("versions here", Verdict.OK, ", ".join(f"{name} {said}" for name, said in versions().items())),
        _environment(site),
        *(_slurm(slurm, layout) if slurm else ()),
        *(_pbs(pbs) if pbs else ()),
        _head(site),
        _folder(layout),
    )


def _ask(argv: Sequence[str], environ: dict[str, str]) -> str:
    """A command's output. Raises ``SchedulerSilent``, also if it failed."""
    done = run_command(argv, environ, _TIMEOUT_S)
    if done.returncode != 0:
        words = one_line(done.stderr or done.stdout)
        raise SchedulerSilent(f"{argv[0]}: {words or f'exit code {done.returncode}'}")
    return done.stdout


def _commands(scheduler: str, needed: Sequence[str]) -> Check:
    missing = [command for command in needed if shutil.which(command) is None]
    if missing:
        advice = f"load {scheduler}'s module, or run this on a login node"
        return Check(f"commands of {scheduler}", Verdict.FAIL, f"no {', '.join(missing)}", advice)
    return Check(f"commands of {scheduler}", Verdict.OK, str(Path(shutil.which(needed[0]) or needed[0]).parent))


def _slurm(node_types: Sequence[NodeType], layout: Layout) -> Iterator[Check]:
    yield (commands := _commands("Slurm", slurm_site.NEEDED))
    yield slurm_site.environment(os.environ)
    if commands.verdict is Verdict.FAIL:
        return
    asked: dict[str | None, slurm_site.Cluster | Check] = {}
    for node_type in node_types:
        clusters = node_type.provider.clusters
        if clusters not in asked:
            asked[clusters] = found = _cluster(clusters)
            yield found if isinstance(found, Check) else Check("Slurm", Verdict.OK, "answers")
        cluster = asked[clusters]
        if not isinstance(cluster, Check):
            yield from slurm_site.judged(node_type, cluster, _tested(node_type, layout))


def _cluster(clusters: str | None) -> slurm_site.Cluster | Check:
    environ = slurm_cli.environment(os.environ)
    try:
        partitions = slurm_site.parse_partitions(_ask(slurm_site.partitions_argv(clusters), environ))
        nodes = slurm_site.parse_nodes(_ask(slurm_site.nodes_argv(clusters), environ))
    except SchedulerSilent as silence:
        advice = "is this a login node of the cluster, and the controller up?"
        return Check("Slurm", Verdict.FAIL, silence.message, advice)
    try:  # a site may have no accounting, or its database may be down
        user = pwd.getpwuid(os.getuid()).pw_name
        accounts = slurm_site.parse_associations(_ask(slurm_site.associations_argv(user), environ))
        qualities = slurm_site.parse_qualities(_ask(slurm_site.qualities_argv(), environ))
    except SchedulerSilent:
        accounts, qualities = (), ()
    return slurm_site.Cluster(partitions, nodes, accounts, qualities)


def _tested(node_type: NodeType, layout: Layout) -> tuple[bool | None, str]:
    """Whether ``sbatch`` would accept the node type's job, and its message; ``None``: no verdict."""
    try:
        job = rehearsed(node_type, "gw-test-0", "true", layout)
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(job.text)
            file.flush()
            argv = ("sbatch", "--test-only", file.name)
            done = run_command(argv, slurm_cli.environment(os.environ), _TIMEOUT_S)
    except ConfigError as error:
        return False, error.message
    except SchedulerSilent as silence:
        return None, silence.message
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    words = (lines or [f"exit code {done.returncode}"])[0 if done.returncode else -1]
    fits = None if slurm_cli.no_verdict(done.returncode, done.stderr) else done.returncode == 0
    return fits, re.sub(r"^(sbatch: (error: )?|allocation failure: )|Job \d+ ", "", words)


def _pbs(node_types: Sequence[NodeType]) -> Iterator[Check]:
    yield (commands := _commands("PBS", pbs_site.NEEDED))
    if commands.verdict is Verdict.FAIL:
        return
    for node_type in node_types:
        queue, name = pbs_site.queue_of(node_type.provider), f"{node_type.name}: queue"
        if queue is None:
            yield Check(name, Verdict.WARN, "none asked for: the default one, which PBS does not report")
            continue
        try:
            found = pbs_site.parse_queue(_ask(pbs_site.queue_argv(queue), pbs_cli.environment(os.environ)), queue)
        except SchedulerSilent as silence:
            yield Check(name, Verdict.FAIL, f"{queue}: {silence.message}", "queue= in the site file; 'qstat -Q'")
            continue
        if found is None:
            yield Check(name, Verdict.WARN, f"{queue}: qstat's answer cannot be read")
        else:
            yield from pbs_site.judged(node_type, found)


def versions() -> dict[str, str]:
    """Versions that must be the same on the nodes: Python, Ray, and Parsl."""
    return {"python": platform.python_version(), "ray": version("ray"), "parsl": version("parsl")}


def _environment(site: Site) -> Check:
    try:
        site.demand_environment(os.environ)
    except ConfigError as error:
        missing = error.message.removeprefix(f"site {site.name}: ").partition("; ")
        return Check("environment of the site", Verdict.FAIL, missing[0], missing[2], configuration=True)
    words = ", ".join(f"{name} is set" for name in site.needs_environment) or "nothing needed"
    return Check("environment of the site", Verdict.OK, words)


def _head(site: Site) -> Check:
    advice = "head_interface= or head_address= in the site file; 'ip -4 -brief address' lists what there is"
    try:
        address = head_address(site)
    except ConfigError as error:
        return Check("address for nodes", Verdict.FAIL, error.message, advice, configuration=True)
    if address.startswith("127."):
        return Check("address for nodes", Verdict.FAIL, f"{address}: no node reaches that", advice)
    if ip_address(address).is_global:
        chosen = site.head_address == "auto" and not site.head_interface
        how = "the default route's interface has it" if chosen else "the site says it"
        words = f"{address} is an address of the internet ({how}): any host can connect to Ray's ports there"
        return Check("address for nodes", Verdict.WARN, words, f"an interface of the cluster's own network: {advice}")
    return Check("address for nodes", Verdict.OK, f"{address}: whether nodes reach it, 'gateway doctor --submit' tries")


def _folder(layout: Layout) -> Check:
    name, tries = "state folder for nodes", "'gateway doctor --submit' tries it"
    kind = file_system(layout.state, Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace"))
    if kind in _MEMORY:
        advice = "nodes must see it: give --state (or GATEWAY_STATE) a folder that all machines share"
        return Check(name, Verdict.FAIL, f"{layout.state} is in this machine's memory ({kind})", advice)
    if kind.removeprefix("fuse.").startswith(_SHARED):
        return Check(name, Verdict.OK, f"{layout.state} is on {kind}, which machines share")
    return Check(name, Verdict.WARN, f"{layout.state} is on {kind}: do nodes see it?", f"{tries}; or give --state")


def file_system(folder: Path, mounts: str) -> str:
    """The type of the file system that ``folder`` is on or would be, from ``/proc/self/mounts``."""
    resolved = folder.expanduser().resolve()
    best, kind = -1, "an unknown file system"
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        place = Path(fields[1].encode().decode("unicode_escape"))  # \040 is a blank
        if (place == resolved or place in resolved.parents) and len(place.parts) >= best:
            best, kind = len(place.parts), fields[2]
    return kind
