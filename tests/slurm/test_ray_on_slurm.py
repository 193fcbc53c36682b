"""One pending agent actor -> a job in the queue -> a node in a network of its own joins the head -> given back."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway_plugin.blocks.ledger import BlockPhase
from gateway_plugin.paths import Layout, block_folder, private_folder
from gateway_plugin.processes import block_processes
from gateway_plugin.site import load_site
from tests.support.clusters import LocalCluster, wait_for
from tests.support.ports import free_port
from tests.support.slurm.virtual import VirtualSlurm

pytestmark = pytest.mark.slurm

SITE = """
from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider
from gateway_plugin.site import NodeType, Site

site = Site(
    name="virtual",
    head_address={head!r},
    port={port},
    ray_port={ray_port},
    serve_port={serve_port},
    node_types=(
        NodeType(
            name="gpu",
            provider=SlurmProvider(
                partition="debug", launcher=SimpleLauncher(), exclusive=False, gpus_per_node=1, walltime="00:05:00"
            ),
            cpus=1,
            gpus=1,
            gpu_memory_gib=1.0,
            worker_init={worker_init!r},
            max_blocks=2,
        ),
    ),
)
"""
AGENT = """
import json, os, socket
@ray.remote
class Agent:
    def where(self):
        return {"block": os.environ["RAY_CLOUD_INSTANCE_ID"], "address": ray.util.get_node_ip_address(),
                "host": socket.gethostname(), "job": os.environ["SLURM_JOB_ID"],
                "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
agent = Agent.options(name="agent", lifetime="detached", num_cpus=0, resources={"gateway_gpu": 1}).remote()
print(json.dumps(ray.get(agent.where.remote())))
"""


@pytest.fixture
def cluster(slurm: VirtualSlurm) -> Iterator[LocalCluster]:
    root = Path(tempfile.mkdtemp(prefix="gwt-", dir="/tmp"))
    layout = Layout(private_folder(root / "state"))
    ports = dict(zip(("port", "ray_port", "serve_port"), {free_port() for _ in range(20)}, strict=False))
    worker_init = f"export PATH={Path(sys.executable).parent}:$PATH"
    site = root / "site.py"
    site.write_text(SITE.format(head=slurm.places.gateway, worker_init=worker_init, **ports))
    cluster = LocalCluster(layout, load_site(str(site)), str(site))
    try:
        yield cluster.start()
    finally:
        cluster.stop()
        shutil.rmtree(root)
        shutil.rmtree(layout.run)


def test_an_agent_gets_a_node_of_slurms_and_its_end_gives_it_back(
    slurm: VirtualSlurm, cluster: LocalCluster, record_property: Callable[[str, object], None]
) -> None:
    answer = json.loads(cluster.drive(AGENT, timeout_s=120))
    (block,) = cluster.blocks()
    assert block.job is not None
    assert (answer["block"], answer["job"]) == (block.name, block.job.id)
    number = int(str(answer["host"]).removeprefix("n"))
    assert answer["address"] == f"{slurm.places.network}.{number}"  # its own, not this machine's
    assert (block.phase, block.node) == (BlockPhase.RUNNING, f"n{number}")
    assert slurm.run("squeue", "-h", "-o", "%A|%T|%N").split() == [f"{block.job.id}|RUNNING|n{number}"]
    cluster.drive("ray.kill(ray.get_actor('agent'))")
    wait_for(lambda: not cluster.blocks(), "the block's end", timeout_s=60)
    (ended,) = cluster.blocks(ended=True)
    assert ended.phase in (BlockPhase.COMPLETED, BlockPhase.CANCELLED)
    assert slurm.run("squeue", "-h") == ""
    folder = block_folder(cluster.layout.run, block.name)
    assert block_processes(block.name, folder) == ()
    assert not folder.exists()
