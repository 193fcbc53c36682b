"""This machine alone: one block, started as an ordinary process. What the demo and the tests use."""

import os

from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider

from gateway_plugin.site import NodeType, Site

site = Site(
    name="local",
    node_types=(
        NodeType(
            name="local",
            # SimpleLauncher: the block's script is run as it is, once. Number of blocks: max_blocks below.
            provider=LocalProvider(launcher=SimpleLauncher(), init_blocks=0, min_blocks=0, max_blocks=1),
            # What Ray may count on; engines share the cores without being held to a number.
            cpus=os.cpu_count() or 1,
            # Host memory for engines, in GiB. The demo's models need 2.8 and 1.6: room for one at a time, on purpose.
            # Raise it to what the machine can spare to keep several models loaded.
            engine_memory_gib=3.0,
            # One machine, one block.
            max_blocks=1,
            # The edge is on the same machine: engines need not be reachable from anywhere else.
            engines_on_loopback=True,
        ),
    ),
    # A block on this machine costs nothing while nobody uses it: its models stay loaded.
    block_unused_s=None,
)
