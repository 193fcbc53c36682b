"""NERSC Perlmutter (Slurm): GPU nodes with 40 GB and with 80 GB A100.

GATEWAY_ACCOUNT: the project to charge, ``m1234`` or ``m1234_g`` (NERSC documentation, Queues and Charges, Assigning
Charges). Other sources are named next to the values.
"""

import os
import shlex
import sys

from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider

from gateway_plugin.site import NodeType, Site

# The environment of this very gateway: home and the community file system are mounted on compute nodes (NERSC
# documentation, File Systems). vLLM brings its CUDA libraries along; no module is needed.
worker_init = f"export PATH={shlex.quote(os.path.join(sys.prefix, 'bin'))}:$PATH"

common = {
    "account": os.environ.get("GATEWAY_ACCOUNT") or None,
    # Most jobs go to "regular"; without a QOS a job goes to "debug", where production is not allowed (NERSC
    # documentation, QOSes and Charges). "regular" gives whole nodes.
    "qos": "regular",
    # 48 hours at most in "regular", as public Parsl configurations for Perlmutter have it; check it against NERSC's own
    # table of QOS limits, which was not at hand. Half of it waits less.
    "walltime": "24:00:00",
    # All 64 cores with two threads each (NERSC documentation, Perlmutter Architecture, GPU nodes).
    "cores_per_node": 128,
    "gpus_per_node": 4,
    "exclusive": True,
    # A job that Slurm starts again by itself would be a block that nobody asked for.
    "scheduler_options": "#SBATCH --no-requeue",
    "cmd_timeout": 120,  # as Parsl's configurations for NERSC have it: Slurm is slow there at times
    "launcher": SimpleLauncher(),
    "init_blocks": 0,
    "max_blocks": 4,
}

site = Site(
    name="perlmutter",
    needs_environment=("GATEWAY_ACCOUNT",),
    # The interface on the login nodes that compute nodes reach (Globus Compute documentation, Endpoint Configurations,
    # Perlmutter).
    head_interface="hsn0",
    node_types=(
        NodeType(
            name="a100",
            # "-C gpu" for the GPU nodes (NERSC documentation, Perlmutter Running Jobs, GPU nodes).
            provider=SlurmProvider(constraint="gpu", **common),
            # One EPYC 7763, four A100 with 40 GB (NERSC documentation, Perlmutter Architecture, System Specifications:
            # 1536 nodes). CUDA takes its part.
            cpus=128,
            gpus=4,
            gpu_memory_gib=38.0,
            max_blocks=4,
            worker_init=worker_init,
        ),
        NodeType(
            name="a100big",
            # "hbm80g" for those with 80 GB, as public job scripts have it; check it against NERSC's pages.
            provider=SlurmProvider(constraint="gpu&hbm80g", **common),
            cpus=128,
            gpus=4,
            gpu_memory_gib=76.0,
            max_blocks=4,
            worker_init=worker_init,
        ),
    ),
    block_idle_s=900.0,
)
