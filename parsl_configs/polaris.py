"""ALCF Polaris (PBS Pro): nodes with four 40 GB A100.

GATEWAY_ACCOUNT: the project to charge (``qsub -A``) [jobs]. The queue "prod" is no choice: it takes jobs of 10 to 496
nodes [jobs: Queues], and a block is one node. Sources, read in November 2026 as the repository of the guides has them
(github.com/argonne-lcf/user-guides); not tried on the machine:

[jobs]     docs.alcf.anl.gov/polaris/running-jobs
[machine]  docs.alcf.anl.gov/polaris/hardware-overview/machine-overview
[parsl]    docs.alcf.anl.gov/polaris/workflows/parsl, and parsl/configs/polaris.py
"""

import os
import shlex
import sys

from parsl.launchers import SimpleLauncher
from parsl.providers import PBSProProvider

from gateway_plugin.site import NodeType, Site

# The environment of this very gateway, from home or eagle (see "filesystems" below). Compute nodes reach the internet
# only through a proxy [jobs: Compute Node Access to the Internet], and a proxy in the environment would catch the
# gateway's own traffic: put weights on eagle beforehand.
worker_init = f"export PATH={shlex.quote(os.path.join(sys.prefix, 'bin'))}:$PATH"

common = {
    "account": os.environ.get("GATEWAY_ACCOUNT") or None,
    # The file systems a job depends on are named: "-l filesystems=home:eagle" [jobs: Interactive Jobs; parsl].
    # "-r n": a job that PBS starts again by itself would be a block that nobody asked for.
    "scheduler_options": "#PBS -l filesystems=home:eagle\n#PBS -r n",
    # 32 cores, 64 threads, four GPUs [machine: Polaris Compute Nodes]; "ncpus" counts threads [parsl].
    "cpus_per_node": 64,
    "select_options": "ngpus=4",
    "cmd_timeout": 120,
    "launcher": SimpleLauncher(),
    "init_blocks": 0,
}

site = Site(
    name="polaris",
    needs_environment=("GATEWAY_ACCOUNT",),
    # The login nodes' interface that compute nodes reach [parsl].
    head_interface="bond0",
    node_types=(
        NodeType(
            name="a100",
            # "preemptable": 1 to 10 nodes, 5 min to 72 hrs, 20 jobs of a project; killed without a warning when the
            # queue "demand" wants the node [jobs: Queues].
            provider=PBSProProvider(queue="preemptable", walltime="24:00:00", max_blocks=4, **common),
            cpus=64,
            # Four A100 with 40 GiB, 160 together [machine: A100 GPU Information]. CUDA takes its part: how much is an
            # estimate.
            gpus=4,
            gpu_memory_gib=38.0,
            max_blocks=4,
            worker_init=worker_init,
        ),
        NodeType(
            name="steady",
            # "capacity": 1 to 4 nodes, 5 min to 168 hrs, one running and one queued job of a user [jobs: Queues].
            provider=PBSProProvider(queue="capacity", walltime="48:00:00", max_blocks=1, **common),
            cpus=64,
            gpus=4,
            gpu_memory_gib=38.0,
            max_blocks=1,
            worker_init=worker_init,
        ),
    ),
    block_idle_s=900.0,
    # A job that is deleted or preempted has "kill_delay" between SIGTERM and SIGKILL: 10 s by PBS's default, and ALCF's
    # guides do not say otherwise. Half of it for requests, half for the engines.
    notice_s=5.0,
)
