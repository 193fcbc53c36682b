"""Ray's autoscaler (v2) over the site's Parsl providers. One block = one Ray node = one job.

Ray makes one of these in the head's monitor process, from ``cluster.yaml``: ``provider: {type: external, module:
gateway_plugin.blocks.node_provider.ParslNodeProvider, site: ..., state: ..., head_address: ...}``.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from parsl.providers import LocalProvider
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from gateway_plugin.blocks.job_script import block_script
from gateway_plugin.blocks.leaving import Leaving
from gateway_plugin.blocks.ledger import BlockPhase
from gateway_plugin.blocks.pool import BlockPool
from gateway_plugin.blocks.recovery import whole_ledger
from gateway_plugin.blocks.stop_files import CancelRequests
from gateway_plugin.errors import GatewayError
from gateway_plugin.log_retention import KEPT, prune
from gateway_plugin.paths import Layout
from gateway_plugin.schedulers.base import script_place, walltime_s
from gateway_plugin.schedulers.select import schedulers_for
from gateway_plugin.site import NodeType, Site, load_site, what_went_wrong

log = logging.getLogger(__name__)

HEAD = "head"
"""The head's instance id and node type."""


def block_name(node_type: str) -> str:
    """A new, unique name: ``gw-TYPE-xxxxxxxx``. It is the Ray instance id and part of the job's name."""
    return f"gw-{node_type}-{secrets.token_hex(4)}"


def open_pool(site: Site, layout: Layout) -> BlockPool:
    """The blocks of a gateway, taken over from its ledger. Raises ``ConfigError``, ``ServiceError``."""
    layout.make()
    schedulers = schedulers_for(site.node_types, layout)
    return BlockPool(
        whole_ledger(layout, schedulers),
        schedulers,
        {node_type.name: node_type.max_blocks for node_type in site.node_types},
        marks=layout.leave_marks,
        requests=CancelRequests(layout.block_cancels),
    )


def script_for(name: str, node_type: NodeType, layout: Layout, head_address: str, site: Site) -> str:
    """The job's text. A block on this machine uses this interpreter, any other the one that ``worker_init`` sets up."""
    leaving = Leaving(walltime_s(node_type.provider), site.leave_before_end_s, site.notice_s)
    if isinstance(node_type.provider, LocalProvider):
        own = os.path.dirname(sys.executable)
        return block_script(name, node_type, layout, head_address, sys.executable, own, leaving)
    return block_script(name, node_type, layout, head_address, leaving=leaving)


def prune_blocks(layout: Layout, living: Collection[str], keep: int = KEPT) -> None:
    """Remove logs, job files and marks of the oldest ended blocks. ``living``: names of blocks that hold a node."""

    def block_of(file: Path) -> str:
        return file.name.removeprefix("block-").partition(".")[0]

    logs, jobs = layout.logs.glob("block-gw-*.log"), script_place(layout).glob("gw-*.*")
    files = (*logs, *jobs, *layout.leave_marks.glob("gw-*"))
    prune(files, block_of, living, keep)


class ParslNodeProvider(NodeProvider):  # type: ignore[misc]  # Ray has no types
    """Ray's ``NodeProvider``. Nodes are named by their block; the head is ``head`` and is never ended here.

    Ray creates nodes with resources, which it made from the site: its base class leaves these to ``create_node``.
    """

    def __init__(self, provider_config: Mapping[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._layout = Layout.of(Path(provider_config["state"]))
        self._site = load_site(provider_config["site"])
        self._head_address: str = provider_config["head_address"]
        self.pool = open_pool(self._site, self._layout)
        # Ray reads cluster.yaml every two seconds and warns each time about two fields that it added itself.
        logging.getLogger("ray.autoscaler._private.util").setLevel(logging.ERROR)
        self._head_tags = {
            TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
            TAG_RAY_USER_NODE_TYPE: HEAD,
            TAG_RAY_NODE_NAME: HEAD,
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        }

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        """The head and every block that holds a node, also one that is ending: Ray must not count its room as free."""
        names = [HEAD, *(block.name for block in self.pool.refresh())]
        return [name for name in names if tag_filters.items() <= self.node_tags(name).items()]

    def is_running(self, node_id: str) -> bool:
        """Whether the job runs; Ray itself determines whether the node has joined."""
        block = self.pool.find(node_id)
        return node_id == HEAD or (block is not None and block.phase is BlockPhase.RUNNING)

    def is_terminated(self, node_id: str) -> bool:
        """Whether the job has ended."""
        block = self.pool.find(node_id)
        return node_id != HEAD and (block is None or block.phase.ended)

    def node_tags(self, node_id: str) -> dict[str, str]:
        """Ray's tags; none for an unknown block."""
        if node_id == HEAD:
            return dict(self._head_tags)
        block = self.pool.find(node_id)
        return {} if block is None else dict(block.tags)

    def set_node_tags(self, node_id: str, tags: Mapping[str, str]) -> None:
        """Add tags, in the ledger too."""
        if node_id == HEAD:
            self._head_tags.update(tags)
        else:
            self.pool.tag(node_id, tags)

    def external_ip(self, node_id: str) -> str:
        """v2 matches nodes by instance id and asks for addresses only to show them."""
        return node_id

    internal_ip = external_ip

    def create_node(self, node_config: Mapping[str, Any], tags: Mapping[str, str], count: int) -> None:
        """Submit ``count`` blocks of the type in ``tags``. Ray retries silently on any exception, so failures before
        submission are recorded in the ledger, as the scheduler's rejections are.

        Raises:
            ServiceError: see ``BlockPool.submit``.
        """
        node_type = self._site.node_type(tags[TAG_RAY_USER_NODE_TYPE])
        for _ in range(count):
            name = block_name(node_type.name)
            own = {**tags, TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_NODE_NAME: name}
            try:
                script = script_for(name, node_type, self._layout, self._head_address, self._site)
                prune_blocks(self._layout, [block.name for block in self.pool.holding()])
            except Exception as error:
                said = error.message if isinstance(error, GatewayError) else what_went_wrong(error)
                self.pool.refuse(name, node_type.name, f"its job could not be written: {said}", own)
                raise
            self.pool.submit(name, node_type.name, script, {**own, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE})

    def terminate_nodes(self, node_ids: list[str]) -> None:
        """Cancel blocks. Unknown ones and the head are left alone."""
        self.pool.cancel(node_ids)
