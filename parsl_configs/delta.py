"""NCSA Delta (Slurm): quad A40, quad A100 and octa A100 nodes.

GATEWAY_ACCOUNT: a GPU allocation, ``xxxx-delta-gpu``, as the command ``accounts`` lists it (Delta user guide, Job
Accounting, Local Account Charging). Other sources are named next to the values.
"""

import os
import shlex
import sys

from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider

from gateway_plugin.site import NodeType, Site

# The environment of this very gateway: compute nodes mount the same home, projects and work file systems (Delta user
# guide, Data Management). vLLM brings its CUDA libraries along; no module is needed.
worker_init = f"export PATH={shlex.quote(os.path.join(sys.prefix, 'bin'))}:$PATH"

common = {
    "account": os.environ.get("GATEWAY_ACCOUNT") or None,
    # 48 hr is the longest of all partitions below (Delta user guide, Running Jobs, Partitions). Half of it waits less.
    "walltime": "24:00:00",
    # Nodes are shared by default; a whole one is "--exclusive --mem=0". The default memory is 1000 MB for each core
    # (Delta user guide, Running Jobs, Node Policies, and Default Partition Values).
    "exclusive": True,
    # Requeueing is off by default (Delta user guide, Running Jobs, Job Policies); said here all the same, because a job
    # that Slurm starts again would be a block that nobody asked for.
    "scheduler_options": "#SBATCH --mem=0\n#SBATCH --no-requeue",
    "cmd_timeout": 60,
    "launcher": SimpleLauncher(),
    "init_blocks": 0,
}

site = Site(
    name="delta",
    needs_environment=("GATEWAY_ACCOUNT",),
    # The login nodes' interface that compute nodes reach (Globus Compute documentation, Endpoint Configurations,
    # Delta). 'ip -4 -brief address' lists what there is.
    head_interface="eth6.560",
    node_types=(
        NodeType(
            name="a40",
            # Partition gpuA40x4, charge factor 0.5 (Delta user guide, Running Jobs, Partitions).
            provider=SlurmProvider(partition="gpuA40x4", gpus_per_node=4, cores_per_node=64, max_blocks=4, **common),
            # 64 cores, one thread each, 4 A40 with 48 GB, ECC on (Delta user guide, System Architecture, 4-Way NVIDIA
            # A40 GPU Compute Node). ECC and CUDA take their part.
            cpus=64,
            gpus=4,
            gpu_memory_gib=42.0,
            max_blocks=4,
            worker_init=worker_init,
        ),
        NodeType(
            name="a100",
            # Partition gpuA100x4, charge factor 1.0 (as above).
            provider=SlurmProvider(partition="gpuA100x4", gpus_per_node=4, cores_per_node=64, max_blocks=4, **common),
            # 64 cores, 4 A100 with 40 GB (Delta user guide, System Architecture, 4-Way NVIDIA A100 GPU Compute Node).
            cpus=64,
            gpus=4,
            gpu_memory_gib=38.0,
            max_blocks=4,
            worker_init=worker_init,
        ),
        NodeType(
            name="a100x8",
            # Partition gpuA100x8, charge factor 1.5 (as above). There are 6 of these nodes: one block at a time.
            provider=SlurmProvider(partition="gpuA100x8", gpus_per_node=8, cores_per_node=128, max_blocks=1, **common),
            # 128 cores, 8 A100 with 40 GB (Delta user guide, System Architecture, 8-Way NVIDIA A100 GPU Large Memory
            # Compute Node).
            cpus=128,
            gpus=8,
            gpu_memory_gib=38.0,
            max_blocks=1,
            worker_init=worker_init,
        ),
    ),
    block_idle_s=900.0,
)
