"""The node agent as a Ray actor. Apart from ``serve.app``, so that its process on a node does not import Serve."""

from __future__ import annotations

import ray

from serve.agent.actor import NodeAgent


class RayNodeAgent(NodeAgent):
    """A node agent that knows its Ray node."""

    async def ray_node(self) -> str:
        """Ray's id of the node."""
        found: str = ray.get_runtime_context().get_node_id()
        return found
