"""``cluster.yaml`` for Ray's autoscaler v2, from a site. Pure."""

from __future__ import annotations

from typing import Any

from gateway_plugin.blocks.job_script import block_resource
from gateway_plugin.paths import Layout
from gateway_plugin.site import Site

NODE_IDLE_S = 6.0
"""How long Ray keeps a node without an agent. How long a block is kept is the controller's policy (it keeps the agent
there); Ray soon releases a node that no agent holds, because nothing controls it."""


def cluster_yaml(site: Site, site_reference: str, layout: Layout, head_address: str) -> dict[str, Any]:
    """The autoscaler's configuration as a mapping to be written as YAML.

    Args:
        site: source of the node types, each with one ``gateway_TYPE`` resource that an agent takes.
        site_reference: how the monitor's process loads the same site (``load_site``).
        head_address: ``IP:port`` of the Ray head, for the blocks.
    """
    types: dict[str, Any] = {"head": {"resources": {"CPU": 0}, "min_workers": 0, "max_workers": 0, "node_config": {}}}
    for node_type in site.node_types:
        types[node_type.name] = {
            "resources": {"CPU": node_type.cpus, "GPU": node_type.gpus, block_resource(node_type.name): 1},
            # The controller maintains min_blocks, by agents: Ray counts nodes, the controller those with an agent.
            "min_workers": 0,
            "max_workers": node_type.max_blocks,
            "node_config": {},
        }
    return {
        "cluster_name": site.name,
        "max_workers": sum(node_type.max_blocks for node_type in site.node_types),
        "upscaling_speed": 1000,  # the controller's policy sets the growth rate too
        "idle_timeout_minutes": NODE_IDLE_S / 60,
        "provider": {
            "type": "external",
            "module": "gateway_plugin.blocks.node_provider.ParslNodeProvider",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "site": site_reference,
            "state": str(layout.state),
            "head_address": head_address,
        },
        "head_node_type": "head",
        "available_node_types": types,
        # The monitor dies with a KeyError where one of these is missing.
        "auth": {},
        "file_mounts": {},
        **{name: [] for name in ("cluster_synced_files", "initialization_commands", "setup_commands")},
        **{f"{node}_{name}": [] for node in ("head", "worker") for name in ("setup_commands", "start_ray_commands")},
    }
