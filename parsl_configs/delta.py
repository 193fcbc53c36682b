"""NCSA Delta (Slurm): quad A40, quad A100 and octa A100 nodes.

GATEWAY_ACCOUNT: a GPU allocation, ``xxxx-delta-gpu``, as the command ``accounts`` lists it [accounting]. Sources, read
in November 2026 as the repository of the guide has them (github.com/ncsa/Delta_doc); not tried on the machine:

[accounting]    docs.ncsa.illinois.edu/systems/delta/en/latest/user_guide/job_accounting.html
[jobs]          docs.ncsa.illinois.edu/systems/delta/en/latest/user_guide/running_jobs.html
[architecture]  docs.ncsa.illinois.edu/systems/delta/en/latest/user_guide/architecture.html
[globus]        github.com/globus/globus-compute, docs/configs/delta.yaml
"""

import os
import shlex
import sys

from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider

from gateway_plugin.site import NodeType, Site

# The environment of this very gateway: home, projects and scratch are Lustre, on all nodes [architecture]. vLLM brings
# its CUDA libraries along; no module is needed.
worker_init = f"export PATH={shlex.quote(os.path.join(sys.prefix, 'bin'))}:$PATH"

common = {
    "account": os.environ.get("GATEWAY_ACCOUNT") or None,
    # "Max Duration" of all partitions below is 48 hr [jobs: Partitions]. Half of it waits less.
    "walltime": "24:00:00",
    # Nodes are shared by default; a whole one is "--exclusive --mem=0" [jobs: Node Policies]. Without "--mem" a job
    # gets 1000 MB for each core [jobs: Default Partition Values].
    "exclusive": True,
    # Requeueing is off by default [jobs: Job Policies]; said here all the same, because a job that Slurm starts again
    # would be a block that nobody asked for.
    "scheduler_options": "#SBATCH --mem=0\n#SBATCH --no-requeue",
    "cmd_timeout": 60,
    "launcher": SimpleLauncher(),
    "init_blocks": 0,
}

site = Site(
    name="delta",
    needs_environment=("GATEWAY_ACCOUNT",),
    # The login nodes' interface that compute nodes reach [globus]; NCSA's guide does not say. 'gateway doctor' looks
    # whether it is there, with --submit whether nodes reach it.
    head_interface="eth6.560",
    node_types=(
        NodeType(
            name="a40",
            # Charge factor 0.5 [jobs: Partitions].
            provider=SlurmProvider(partition="gpuA40x4", gpus_per_node=4, cores_per_node=64, max_blocks=4, **common),
            # 64 cores, one thread each, four A40 with 48 GB and ECC [architecture: 4-Way NVIDIA A40]. ECC and CUDA take
            # their part: how much is an estimate.
            cpus=64,
            gpus=4,
            gpu_memory_gib=42.0,
            max_blocks=4,
            worker_init=worker_init,
        ),
        NodeType(
            name="a100",
            # Charge factor 1.0 [jobs: Partitions].
            provider=SlurmProvider(partition="gpuA100x4", gpus_per_node=4, cores_per_node=64, max_blocks=4, **common),
            # 64 cores, four A100 with 40 GB [architecture: 4-Way NVIDIA A100].
            cpus=64,
            gpus=4,
            gpu_memory_gib=38.0,
            max_blocks=4,
            worker_init=worker_init,
        ),
        NodeType(
            name="a100x8",
            # Charge factor 1.5 [jobs: Partitions]. There are 6 of these nodes [architecture]: one block at a time.
            provider=SlurmProvider(partition="gpuA100x8", gpus_per_node=8, cores_per_node=128, max_blocks=1, **common),
            # 128 cores, eight A100 with 40 GB [architecture: 8-Way NVIDIA A100 GPU Large Memory].
            cpus=128,
            gpus=8,
            gpu_memory_gib=38.0,
            max_blocks=1,
            worker_init=worker_init,
        ),
    ),
    block_idle_s=900.0,
)
