"""A whole gateway whose head runs on this machine and whose blocks are jobs of a virtual Slurm, with fake engines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway_plugin.blocks.ledger import Block, Ledger
from tests.support.gateways import ROOT, Gateway, fake_model, gateway_of, wait_for
from tests.support.slurm.virtual import VirtualSlurm

_SITE = """
from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider
from gateway_plugin.site import Limits, NodeType, Site

site = Site(
    name="virtual", head_address={head!r}, port={port}, ray_port={ray_port},
    limits=Limits(**{limits!r}), **{options!r},
    node_types=(NodeType(
        name="node",
        provider=SlurmProvider(
            partition="debug", launcher=SimpleLauncher(), exclusive=True, walltime={walltime!r},
        ),
        cpus=2, engine_memory_gib=1.5, max_blocks={blocks}, worker_init={worker_init!r},
    ),),
)
"""


@dataclass(frozen=True)
class QueuedJob:
    """One of the gateway's jobs as ``squeue`` shows it."""

    id: str
    state: str
    block: str
    node: str


def model_of_a_node(memory: Path, *options: str, **entry: Any) -> dict[str, Any]:
    """A catalog entry of which one fits on a node: 20 tokens a second, eight an answer, unless ``options`` differ."""
    several_nodes = ("--memory-room-mib", "1000000")
    return fake_model(memory, *several_nodes, "--token-rate", "20", "--load-delay-s", "0.3", *options, **entry)


@contextmanager
def slurm_gateway(
    slurm: VirtualSlurm,
    models: Mapping[str, tuple[str, ...]],
    *,
    blocks: int = 2,
    walltime: str = "00:30:00",
    wait_s: float = 90.0,
    **options: Any,
) -> Iterator[Gateway]:
    """A running gateway; ``models``: name -> options of its engine. ``options``: of the site, such as ``block_idle_s``.

    Nothing of it is left afterwards, no job either.
    """

    def site(port: int, ray_port: int) -> str:
        worker_init = f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}"
        return _SITE.format(
            head=slurm.places.gateway, port=port, ray_port=ray_port, walltime=walltime,
            worker_init=worker_init, limits={"wait_s": wait_s}, options=options, blocks=blocks,
        )  # fmt: skip

    def catalog(memory: Path) -> dict[str, Any]:
        return {name: model_of_a_node(memory, *given) for name, given in models.items()}

    try:
        with gateway_of(site, catalog, environment=slurm.env()) as made:
            yield made
            left = queued(slurm)
        assert not queued(slurm), f"'gateway down' left jobs, before it: {left}"
    finally:
        slurm.clear()


def queued(slurm: VirtualSlurm, state: str = "") -> tuple[QueuedJob, ...]:
    """The gateway's jobs that are pending, running or ending; only those in ``state``, if one is given."""
    rows = slurm.run("squeue", "-h", "--all", "-o", "%A|%T|%j|%N").splitlines()
    jobs = [QueuedJob(number, state, _block_in(name), node) for number, state, name, node in map(_fields, rows)]
    return tuple(job for job in jobs if job.block and state in ("", job.state))


def ever_submitted(slurm: VirtualSlurm) -> frozenset[str]:
    """The ids of every gateway job that this Slurm ever received: those it remembers and those accounted for."""
    rows = slurm.run("squeue", "-h", "--all", "-t", "all", "-o", "%A|%j").splitlines()
    rows += slurm.run("sacct", "-X", "-n", "-P", "-S", "now-1day", "-o", "JobIDRaw,JobName").splitlines()
    return frozenset(number for number, name in (row.split("|", 1) for row in rows) if _block_in(name))


def _fields(row: str) -> list[str]:
    return row.split("|")


def _block_in(job_name: str) -> str:
    """``gw-TYPE-xxxxxxxx`` in the name that Parsl gave a job; empty for another user's job."""
    return next((part for part in job_name.split(".") if part.startswith("gw-")), "")


def blocks_of(gateway: Gateway) -> tuple[Block, ...]:
    """The blocks in the gateway's ledger that hold a node."""
    return tuple(block for block in Ledger(gateway.layout.ledger).read().values() if not block.phase.ended)


def engine_nodes(gateway: Gateway) -> dict[str, str]:
    """Model -> name of the Slurm node of its one ready engine."""
    status = gateway.status()
    hosts = {block.name: block.node or "" for block in blocks_of(gateway)}
    nodes = {node["id"]: hosts.get(node["block"], "") for node in status["nodes"]}
    return {engine["model"]: nodes[engine["node"]] for engine in status["engines"] if engine["state"] == "ready"}


def pinned(gateway: Gateway, *models: str, timeout_s: float = 240.0) -> dict[str, str]:
    """Pin models, so that none makes room for another, and wait until each is ready; ``engine_nodes`` then."""
    with gateway.client() as client:
        for model in models:
            client.post("/gateway/v1/models/pin", json={"model": model}).raise_for_status()

    def ready() -> dict[str, str]:
        found = engine_nodes(gateway)
        return found if set(models) <= set(found) else {}

    found: dict[str, str] = wait_for(ready, timeout_s, f"{', '.join(models)} ready")
    return found


def emptied(gateway: Gateway, slurm: VirtualSlurm) -> None:
    """Unpin and unload every model, give every block back, and wait until the queue is empty."""
    with gateway.client() as client:
        for model in client.get("/v1/models").json()["data"]:
            for verb in ("unpin", "unload"):
                client.post(f"/gateway/v1/models/{verb}", json={"model": model["id"]}).raise_for_status()
        for block in blocks_of(gateway):
            client.post("/gateway/v1/blocks/drain", json={"block": block.name}).raise_for_status()
    wait_for(lambda: not queued(slurm) and not gateway.status()["nodes"], 90, "every block given back")


def at_rest(gateway: Gateway, slurm: VirtualSlurm) -> None:
    """Wait until a shared gateway is idle for the next test: ready, no waiters, Slurm repaired, no pending job."""

    def restless() -> list[str]:
        status = gateway.status()
        nodes = slurm.run("sinfo", "-h", "-N", "-o", "%N %T").splitlines()
        pending = queued(slurm, "PENDING")
        return [
            *([f"gateway {status['state']}"] if status["state"] != "ready" else []),
            *([f"waiting {status['waiting']}"] if status["waiting"] else []),
            *(node for node in nodes if node.split()[1] not in ("idle", "allocated", "mixed")),
            *(f"job {job.id} of {job.block} pends" for job in pending),
        ]

    slurm.repair()
    # Nodes that died early one after the other, each in a test of its own, must not cause a back-off.
    with gateway.client() as client:
        client.post("/gateway/v1/blocks/retry", json={"type": "node"}).raise_for_status()
    wait_for(lambda: not restless(), 90, lambda: f"the gateway and Slurm at rest; still: {', '.join(restless())}")


@contextmanager
def all_nodes_taken(slurm: VirtualSlurm) -> Iterator[None]:
    """Another user's job on every node, until the end of this context."""
    count = slurm.shape.nodes
    script = "#!/bin/sh\ntrap 'exit 0' TERM\nwhile true; do sleep 0.2 & wait $!; done\n"
    argv = ("sbatch", "--parsable", "--exclusive", f"--nodes={count}", "--job-name=somebody", "--output=/dev/null")
    done = subprocess.run(argv, env=slurm.env(), input=script, capture_output=True, text=True, check=True, timeout=60)
    job = done.stdout.strip().split(";")[0]
    try:
        wait_for(lambda: "RUNNING" in slurm.run("squeue", "-h", "-j", job, "-o", "%T"), 60, "somebody's job runs")
        yield
    finally:
        slurm.run("scancel", job, check=False)
