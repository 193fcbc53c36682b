"""Composition root of the Serve application: the only module that imports controller, ingress and agent together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve as ray_serve

from gateway_plugin.edge.haproxy_config import DESK_AT_A_TIME
from gateway_plugin.errors import ConfigError
from gateway_plugin.hub import cache_folder
from gateway_plugin.paths import Layout
from gateway_plugin.service.deployment import noted
from gateway_plugin.site import NodeType, Site
from serve.agent.actor import AgentSettings
from serve.controller.deployment import Controller
from serve.controller.weights import WeightsPlace
from serve.core.policy import NodeTypeSpec, Policy
from serve.ingress.desk import ServedDesk
from serve.ingress.http import ServedIngress
from serve.ray_agent import RayNodeAgent

_ON_HEAD = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
"""All need the edge's sockets, which are on the head's machine."""

_HEALTH_TIMEOUT_S = 120.0
"""A replica whose health check takes longer than this, three times in a row, is replaced, and its requests in flight
are cut. One that is only busy, or starved by its machine, answers sooner; one that died is noticed at once, because its
process is gone."""


def node_type_spec(node_type: NodeType) -> NodeTypeSpec:
    """A node type as the core needs it. Pure."""
    return NodeTypeSpec(
        name=node_type.name,
        host_mib=int(node_type.engine_memory_gib * 1024),
        gpu_mib=(int(node_type.gpu_memory_gib * 1024),) * node_type.gpus,
        min_nodes=node_type.min_blocks,
        max_nodes=node_type.max_blocks,
    )


def policy(site: Site) -> Policy:
    """The core's policy, from the site's limits. Pure."""
    return Policy(
        node_types=tuple(node_type_spec(node_type) for node_type in site.node_types),
        switching=site.switching,
        waiting_max=site.limits.waiting_requests,
        abandoned_load_grace_s=site.limits.abandoned_load_grace_s,
        max_wait_s=site.limits.max_wait_s,
        block_idle_s=site.block_idle_s,
        block_unused_s=site.block_unused_s,
        last_block_idle_s=site.last_block_idle_s,
        pending_idle_s=site.pending_idle_s,
        drain_before_end_s=site.drain_before_end_s,
        leave_before_end_s=site.leave_before_end_s,
        notice_s=site.notice_s,
        sleep_once_loaded=site.sleep_once_loaded,
    )


class AgentMaker:
    """(node, node type) -> class and arguments of its agent."""

    def __init__(self, state: str, site: Site) -> None:
        self._settings = {
            each.name: AgentSettings(
                node="",
                type=each.name,
                state=state,
                host_mib=node_type_spec(each).host_mib,
                gpu_mib=node_type_spec(each).gpu_mib,
                on_loopback=each.engines_on_loopback,
                isolate=site.isolate_engines,
                fetched=None if site.fetch == "by-engine" else cache_folder(site.weights_folder),
                sleep_mib=None if each.sleep_memory_gib is None else int(each.sleep_memory_gib * 1024),
            )
            for each in site.node_types
        }

    def __call__(self, node: str, kind: NodeTypeSpec) -> tuple[type[Any], tuple[Any, ...]]:
        return RayNodeAgent, (replace(self._settings[kind.name], node=node),)


def build(args: dict[str, str]) -> ray_serve.Application:
    """The application of the gateway whose state folder is ``args["state"]``.

    Raises:
        ServiceError: the folder has no ``service.json``.
        ConfigError: its site cannot be loaded.
    """
    state = args.get("state")
    if not state:
        raise ConfigError("serve.app:build wants the argument 'state', the gateway's state folder")
    site = noted(Layout.of(Path(state))).site
    place = WeightsPlace(site.fetch, cache_folder(site.weights_folder))
    controller = _deployment(
        Controller,
        "controller",
        # Each request in the ingress has two calls open at most: its own wait, and a query of the model's state.
        max_ongoing_requests=2 * site.limits.relayed_requests + 2 * DESK_AT_A_TIME,
    ).bind(state, policy(site), AgentMaker(state, site), weights=place)
    # They listen by themselves; the replicas only stay alive. (Serve has no deployment without a place for a request.)
    ingress = _deployment(ServedIngress, "ingress", max_ongoing_requests=1).bind(state, site.limits, controller)
    return _deployment(ServedDesk, "desk", max_ongoing_requests=1).bind(state, site.limits, controller, ingress)


def _deployment(cls: type[Any], name: str, **options: int) -> ray_serve.Deployment:
    return ray_serve.deployment(
        cls,
        name=name,
        num_replicas=1,
        graceful_shutdown_timeout_s=2.0,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        ray_actor_options=_ON_HEAD,
        **options,
    )
