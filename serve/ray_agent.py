"""The node agent as a Ray actor. Apart from ``serve.app``, so that its process on a node does not import Serve."""

from __future__ import annotations

from collections.abc import Mapping

import ray

from serve.agent.actor import NodeAgent
from serve.agent.adapters import adapt


class RayNodeAgent(NodeAgent):
    """A node agent that knows its Ray node."""

    async def ray_node(self) -> str:
        """Ray's id of the node."""
        found: str = ray.get_runtime_context().get_node_id()
        return found

    async def adapt(self, engine: str, adapters: Mapping[str, str]) -> tuple[str, str]:
        """Have an engine serve these LoRA adapters and no others, without a reload (``serve.agent.adapters``)."""
        return await adapt(self._layout, engine, adapters)
