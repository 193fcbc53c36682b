"""A Slurm cluster: the file to copy. Put the copy anywhere and start with ``gateway up --site ./mycluster.py``.

``gateway up --dry-run --site ./mycluster.py`` prints the very job scripts that would be submitted. What a cluster has
is said by ``sinfo -o '%P %l %D %c %m %G'`` (partition, longest walltime, nodes, cores, MB of memory, GPUs); which
accounts are yours by ``sacctmgr show assoc user=$USER format=account,partition,qos``.
"""

import os
import shlex
import sys

from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider

from gateway_plugin.site import NodeType, Site

# Whom to charge is not a property of the cluster: it is taken from the environment, and 'gateway up' says so if it is
# missing. A cluster without accounting needs neither this line, nor 'account' and 'needs_environment' below.
account = os.environ.get("GATEWAY_ACCOUNT") or None

# Run on the node before Ray starts. This very virtual environment, where nodes see the folder it lies in (home folders
# usually are shared); else the 'module load' and 'source .../bin/activate' lines that make 'python' one with
# gateway-plugin in it.
worker_init = f"export PATH={shlex.quote(os.path.join(sys.prefix, 'bin'))}:$PATH"

site = Site(
    name="slurm_example",
    needs_environment=("GATEWAY_ACCOUNT",),
    # One entry for each kind of node that is worth asking for. A model goes to the smallest kind that can hold it.
    node_types=(
        NodeType(
            # A short word: it is part of every job's name, gw-gpu-1a2b3c4d.
            name="gpu",
            provider=SlurmProvider(
                partition="gpu",
                account=account,
                # Or None. A quality of service, as 'sacctmgr show qos' lists them.
                qos=None,
                # How long a block may live. Longer waits longer in the queue; shorter loads models more often, because
                # a block's replacement starts empty. More than the partition allows pends for ever.
                walltime="12:00:00",
                # All GPUs of the node: the gateway shares them between models by itself.
                gpus_per_node=4,
                # All cores, and with --mem=0 all memory: weights pass through host memory when they are loaded.
                exclusive=True,
                cores_per_node=64,
                # --no-requeue: a job that Slurm starts again by itself would be a block that nobody asked for.
                scheduler_options="#SBATCH --mem=0\n#SBATCH --no-requeue",
                # How long sbatch, squeue and scancel may take: a busy controller answers late.
                cmd_timeout=30,
                # One block is one node and one task: the script is run as it is, once.
                launcher=SimpleLauncher(),
                # How many is the gateway's to decide (min_blocks and max_blocks below).
                init_blocks=0,
                max_blocks=4,
            ),
            # What a node holds. GPU memory: of one GPU, 'nvidia-smi' says how much it has; leave a few GiB to CUDA.
            cpus=64,
            gpus=4,
            gpu_memory_gib=76.0,
            # Never fewer than this, whatever it costs; never more than that, whatever is asked.
            min_blocks=0,
            max_blocks=4,
            worker_init=worker_init,
        ),
        NodeType(
            name="cpu",
            provider=SlurmProvider(
                partition="cpu",
                account=account,
                walltime="12:00:00",
                exclusive=True,
                cores_per_node=128,
                scheduler_options="#SBATCH --mem=0\n#SBATCH --no-requeue",
                cmd_timeout=30,
                launcher=SimpleLauncher(),
                init_blocks=0,
                max_blocks=2,
            ),
            cpus=128,
            # Host memory that engines without a GPU may use together: less than the node has.
            engine_memory_gib=200.0,
            max_blocks=2,
            worker_init=worker_init,
        ),
    ),
    # Which address of this machine nodes can reach. Left out: that of the default route. Else one of
    #   head_address="10.1.2.3"    head_interface="ib0"
    # Where 'gateway models fetch' puts weights from the hub: a large folder that nodes see by the same path. Left out:
    # the hub's own cache, in your home folder.
    #   weights_folder="/scratch/project/weights"    fetch="on-request"
    # How long a block is kept that holds no model and that nobody needs. A new one costs a wait in the queue.
    block_idle_s=900.0,
    # And one whose models are loaded, but used by nobody. The last block of all is kept longer (last_block_idle_s).
    block_unused_s=1800.0,
    # How long a job may be pending. Must be longer than the longest wait in the queue.
    queue_wait_max_s=7 * 86400.0,
)
