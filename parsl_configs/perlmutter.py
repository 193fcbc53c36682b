"""NERSC Perlmutter (Slurm): GPU nodes with 40 GB and with 80 GB A100.

GATEWAY_ACCOUNT: the project to charge; for GPU nodes its name with ``_g``: ``m1234_g`` [guides]. Sources, read in
November 2026; not tried on the machine. Of NERSC's own pages only the beginnings were at hand: what rests on others'
job scripts is said where it stands, and wants a look at NERSC's table of QOS limits [policy].

[policy]   docs.nersc.gov/jobs/policy
[hbm80g]   gitlab.com/NERSC/nersc.gitlab.io, merge request 2670: "gpu&hbm80g" for the nodes with 80 GB
[guides]   impactx.readthedocs.io, Perlmutter: "GPU projects must end in ..._g"
[systems]  docs.nersc.gov/systems/perlmutter/architecture
"""

import os
import shlex
import sys

from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider

from gateway_plugin.site import NodeType, Site

# The environment of this very gateway: home and the community file system are mounted on compute nodes. vLLM brings its
# CUDA libraries along; no module is needed.
worker_init = f"export PATH={shlex.quote(os.path.join(sys.prefix, 'bin'))}:$PATH"

common = {
    "account": os.environ.get("GATEWAY_ACCOUNT") or None,
    # "Most jobs are submitted to the regular QOS"; without one a job goes to "debug" [policy]. "regular" gives whole
    # nodes.
    "qos": "regular",
    # Not verified: public job scripts for "regular" ask for up to 24 hours, and 48 is said to be the longest. 'gateway
    # doctor' asks Slurm itself.
    "walltime": "24:00:00",
    # All 64 cores with two threads each [systems].
    "cores_per_node": 128,
    "gpus_per_node": 4,
    "exclusive": True,
    # A job that Slurm starts again by itself would be a block that nobody asked for.
    "scheduler_options": "#SBATCH --no-requeue",
    "cmd_timeout": 120,  # as Globus Compute's configuration for Perlmutter has it: Slurm is slow there at times
    "launcher": SimpleLauncher(),
    "init_blocks": 0,
    "max_blocks": 4,
}

site = Site(
    name="perlmutter",
    needs_environment=("GATEWAY_ACCOUNT",),
    # The login nodes' interface to the high-speed network. Not verified: Globus Compute's examples for Perlmutter have
    # had "hsn0" and "nmn0". 'gateway doctor' looks whether it is there, with --submit whether nodes reach it.
    head_interface="hsn0",
    node_types=(
        NodeType(
            name="a100",
            # "gpu" is any GPU node [hbm80g]: one with 80 GB counts as one with 40 here.
            provider=SlurmProvider(constraint="gpu", **common),
            # One EPYC 7763, four A100 with 40 GB [systems]. CUDA takes its part: how much is an estimate.
            cpus=128,
            gpus=4,
            gpu_memory_gib=38.0,
            max_blocks=4,
            worker_init=worker_init,
        ),
        NodeType(
            name="a100big",
            # Those with 80 GB only [hbm80g].
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
