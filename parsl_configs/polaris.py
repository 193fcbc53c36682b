"""ALCF Polaris (PBS Pro): nodes with four 40 GB A100.

GATEWAY_ACCOUNT: the project to charge (``qsub -A``; ALCF user guides, Polaris, Running Jobs). Other sources are named
next to the values. The queue "prod" is no choice: it takes jobs of 10 nodes and more, and a block is one node.
"""

import os
import shlex
import sys

from parsl.launchers import SimpleLauncher
from parsl.providers import PBSProProvider

from gateway_plugin.site import NodeType, Site

# The environment of this very gateway, from home or eagle (see "filesystems" below). Compute nodes reach the internet
# only through a proxy (ALCF user guides, Polaris, Running Jobs, Compute Node Access to the Internet), and a proxy in
# the environment would catch the gateway's own traffic: put weights on eagle beforehand.
worker_init = f"export PATH={shlex.quote(os.path.join(sys.prefix, 'bin'))}:$PATH"

common = {
    "account": os.environ.get("GATEWAY_ACCOUNT") or None,
    # The file systems a job depends on must be named (ALCF user guides, Polaris, Running Jobs, Interactive Jobs).
    # "-r n": a job that PBS starts again by itself would be a block that nobody asked for.
    "scheduler_options": "#PBS -l filesystems=home:eagle\n#PBS -r n",
    # 32 cores with two threads each (ALCF user guides, Polaris, Machine Overview, Compute Nodes), four GPUs.
    "cpus_per_node": 64,
    "select_options": "ngpus=4",
    "cmd_timeout": 120,
    "launcher": SimpleLauncher(),
    "init_blocks": 0,
}

site = Site(
    name="polaris",
    needs_environment=("GATEWAY_ACCOUNT",),
    # The interface on the login nodes that compute nodes reach (ALCF user guides, Polaris, Workflows, Parsl).
    head_interface="bond0",
    node_types=(
        NodeType(
            name="a100",
            # "preemptable": 1 to 10 nodes, 72 hrs at most, 20 jobs of a project; killed without a warning when the
            # queue "demand" wants the node (ALCF user guides, Polaris, Running Jobs, Queues).
            provider=PBSProProvider(queue="preemptable", walltime="24:00:00", max_blocks=4, **common),
            cpus=64,
            # Four A100 with 40 GiB (ALCF user guides, Polaris, Machine Overview, A100 GPU Information). CUDA takes its
            # part.
            gpus=4,
            gpu_memory_gib=38.0,
            max_blocks=4,
            worker_init=worker_init,
        ),
        NodeType(
            name="steady",
            # "capacity": 1 to 4 nodes, 168 hrs at most, one running job of a user (ALCF user guides, Polaris, Running
            # Jobs, Queues).
            provider=PBSProProvider(queue="capacity", walltime="48:00:00", max_blocks=1, **common),
            cpus=64,
            gpus=4,
            gpu_memory_gib=38.0,
            max_blocks=1,
            worker_init=worker_init,
        ),
    ),
    block_idle_s=900.0,
)
