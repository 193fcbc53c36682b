"""Node agents as Ray actors: created, found again, watched, ended. Their reports become events.

An agent is detached and named after its node, so that it outlives the controller, and is never restarted by Ray, which
would request a block without the policy. Calls that wait for Ray's head run in a thread: the head may be away, and the
controller's loop must not block on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.core.generated import autoscaler_pb2
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gateway_plugin.clock import SteadyClock
from gateway_plugin.masking import masked, secrets_of
from serve.controller.times import agents_event
from serve.core.events import EngineExited, Event, NodeFailed, NodeGone
from serve.core.policy import NodeTypeSpec

log = logging.getLogger("gateway.controller")

NAMESPACE = "gateway"
_PREFIX = "gateway-agent-"
_POLL_S = 20.0
_DRAIN_S = 5.0
"""Timeout of a drain request to Ray's GCS."""
_LOST = (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError, ray.exceptions.ActorUnavailableError)

MakeAgent = Callable[[str, NodeTypeSpec], tuple[type[Any], tuple[Any, ...]]]
"""(node, node type) -> the agent's class and the arguments it is created with. Given by ``serve.app``."""


def agents_alive() -> tuple[str, ...]:
    """Nodes whose agents exist (pending ones too), found by the agents' names. Blocking: call it in a thread."""
    found = ray.util.list_named_actors(all_namespaces=True)
    names = [entry["name"] for entry in found if entry["namespace"] == NAMESPACE]
    return tuple(sorted(name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)))


class Agents:
    """Handles of the agents, one watcher each."""

    def __init__(
        self, kinds: tuple[NodeTypeSpec, ...], make: MakeAgent, post: Callable[[Event], None], clock: SteadyClock
    ) -> None:
        self._clock = clock
        self._kinds: Mapping[str, NodeTypeSpec] = {kind.name: kind for kind in kinds}
        self._make = make
        self._post = post
        self._handles: dict[str, Any] = {}
        self._ray_nodes: dict[str, str] = {}  # node -> Ray's id of the node its agent ran on
        self._watchers: dict[str, asyncio.Task[None]] = {}

    async def find(self, node: str) -> None:
        """Take over the agent that an earlier controller made."""
        try:
            handle = await asyncio.to_thread(ray.get_actor, _PREFIX + node, namespace=NAMESPACE)
        except ValueError:
            self._post(NodeGone(node, "its agent is gone"))
            return
        self._watch(node, handle)

    async def create(self, node: str, kind_name: str, block: str) -> None:
        """Create an agent. With ``block``, only on the node where it was before: there or nowhere."""
        kind = self._kinds.get(kind_name)
        if kind is None:
            self._post(NodeFailed(node, f"the site has no node type {kind_name!r} any more"))
            return
        agent_class, arguments = self._make(node, kind)
        options: dict[str, Any] = {
            "name": _PREFIX + node,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": 0,
            "num_cpus": 0,
            "resources": {f"gateway_{kind.name}": 1},
            "max_concurrency": 1000,
        }
        if block:
            ray_node = self._ray_nodes.get(node)
            if ray_node is None:
                self._post(NodeFailed(node, f"the node of block {block} is not known"))
                return
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(ray_node, soft=False)
        try:
            handle = await asyncio.to_thread(ray.remote(agent_class).options(**options).remote, *arguments)
        except ValueError as error:  # the name is taken: its agent is alive after all
            log.warning("agent-exists", extra={"node": node, "error": str(error)})
            await self.find(node)
            return
        self._watch(node, handle)

    async def end(self, node: str, block_goes: bool) -> None:
        """End the agent; its node becomes idle and the autoscaler gives the block back.

        With ``block_goes`` nothing else is placed on the node before that. Ray waits some seconds for a node to stay
        idle, and would place an agent there that waits for its own block, e.g. the successor of this one.
        """
        ray_node = self._ray_nodes.get(node)
        if block_goes and ray_node is not None:
            try:
                await asyncio.to_thread(_drain, ray_node)
            except ray.exceptions.RayError as error:  # it ends all the same; an agent placed there is ended again
                log.warning("ray-node-not-drained", extra={"node": node, "error": _first_line(error)})
        handle = self._handles.get(node)
        if handle is None:
            try:
                handle = await asyncio.to_thread(ray.get_actor, _PREFIX + node, namespace=NAMESPACE)
            except ValueError:
                return
        await asyncio.to_thread(ray.kill, handle)

    def call(self, node: str, verb: str, *arguments: Any) -> Any:
        """The awaitable of one call. Raises ``KeyError`` for a node without agent."""
        return getattr(self._handles[node], verb).remote(*arguments)

    def still(self, node: str, in_flight: Mapping[str, int]) -> None:
        """Report to a node's agent what the edge sees of its engines; repeated, so that no outcome matters."""
        verb = getattr(self._handles.get(node), "still", None)  # an agent of an earlier version has none
        if verb is not None:
            verb.remote(dict(in_flight))

    def _watch(self, node: str, handle: Any) -> None:
        self._handles[node] = handle
        previous = self._watchers.pop(node, None)
        if previous is not None:
            previous.cancel()
        task = asyncio.create_task(self._follow(node, handle), name=f"watch-{node}")
        self._watchers[node] = task
        task.add_done_callback(lambda ended: self._forget(node, ended))

    def _forget(self, node: str, ended: asyncio.Task[None]) -> None:
        """Its agent is gone. Its Ray node is still known: another agent may be created there."""
        if self._watchers.get(node) is ended:
            del self._watchers[node]
        if not ended.cancelled() and ended.exception() is not None:
            log.error("agent-watch-failed", exc_info=ended.exception(), extra={"node": node})

    async def _follow(self, node: str, handle: Any) -> None:
        joined = False
        try:
            self._ray_nodes[node] = await handle.ray_node.remote()
            said = await handle.describe.remote()
            found, after = said if isinstance(said, tuple) else (said, 0)  # an agent of an earlier version
            self._post(agents_event(found, self._clock))
            joined = True
            while True:
                after, events = await handle.events.remote(after, _POLL_S)
                for event in events:
                    self._post(agents_event(event, self._clock))
        except ray.exceptions.RayError as error:
            reason, alive = _first_line(error), False
            if self._handles.get(node) is handle:
                del self._handles[node]
            if isinstance(error, ray.exceptions.RayTaskError):  # it raised: a defect, or a node it cannot serve on
                log.exception("agent-defect", extra={"node": node})
                await asyncio.to_thread(ray.kill, handle)
            elif joined:
                alive = await asyncio.to_thread(_ray_node_alive, self._ray_nodes.get(node, ""))
            if not alive:
                self._ray_nodes.pop(node, None)
            self._post(NodeGone(node, reason, node_alive=alive) if joined else NodeFailed(node, reason))

    async def command(self, node: str, verb: str, command: Any, *arguments: Any) -> None:
        """Send one engine command; what the agent refuses comes back as the engine's exit."""
        try:
            await self.call(node, verb, command, *arguments)
        except (KeyError, *_LOST) as error:
            # The watcher reports the node; here it only matters that the engine is not waited for.
            log.warning("agent-unreachable", extra={"node": node, "verb": verb, "error": _first_line(error)})
        except ray.exceptions.RayTaskError as error:
            log.exception("agent-refused", extra={"node": node, "verb": verb})
            said = masked(_first_line(error), secrets_of(command.model.variables) if verb == "start" else ())
            refused = "its agent refused the command"
            self._post(EngineExited(command.engine, said, expected=False, summary=refused))


def _drain(ray_node: str) -> None:
    """Have Ray place nothing on this node any more; Ray ends it as soon as nothing runs there. The same as
    ``ray drain-node``. Raises ``RayError``."""
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # the other is refused while busy
    accepted, why = client.drain_node(ray_node, reason, "the gateway gives its block back", 0, timeout=_DRAIN_S)
    if not accepted:
        log.warning("ray-node-not-drained", extra={"ray_node": ray_node, "error": why})


def _ray_node_alive(ray_node: str) -> bool:
    return any(entry["NodeID"] == ray_node and entry["Alive"] for entry in ray.nodes())


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else lines[0])[:400] if lines else repr(error)
