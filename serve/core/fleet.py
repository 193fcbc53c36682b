"""What the controller knows: frozen values, changed only by ``serve.core.step``.

Memory is counted in whole MiB so that sums are exact. Times are seconds of the controller's wall clock
(``time.time()``; they must survive a restart), given as arguments, never read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from gateway_plugin.catalog import Model


class EngineState(Enum):
    LOADING = "loading"
    """Its process was asked for and has not answered a real request yet. Holds its memory."""
    READY = "ready"
    """It answered a real request; its route is open or being opened."""
    DRAINING = "draining"
    """Its route takes no new request; what is in flight goes on. Can still be taken back (``READY``)."""
    ASLEEP = "asleep"
    """Sleep level 1: device memory freed. Reserved for the issue on switching; no rule enters it yet."""
    STOPPING = "stopping"
    """The agent was told to end its process. Holds its memory until the agent says that it is gone."""


class RouteState(Enum):
    NONE = "none"
    OPENING = "opening"
    """The edge was told; it has not reported the server UP yet."""
    OPEN = "open"
    DRAINING = "draining"


class NodePhase(Enum):
    PENDING = "pending"
    """Its agent was created and waits for a block."""
    UP = "up"
    LEAVING = "leaving"
    """Takes no new engine; its engines drain; then its agent is killed and the block goes."""


@dataclass(frozen=True)
class Node:
    """One block's node, as its agent described it. ``id`` is the agent's name, chosen by the controller."""

    id: str
    type: str
    phase: NodePhase
    since: float
    host_mib: int = 0
    """Host memory that engines without a GPU share."""
    gpu_mib: tuple[int, ...] = ()
    """Memory of each GPU, by index."""
    address: str = ""
    block: str = ""
    """The block's name (Ray's instance id)."""
    idle_since: float | None = None
    """Since when it has held no engine."""


@dataclass(frozen=True)
class Engine:
    """One engine process and its route."""

    id: str
    model: str
    node: str
    gpus: tuple[int, ...]
    memory_mib: int
    """Per GPU, or of the host where ``gpus`` is empty."""
    generation: int
    state: EngineState
    since: float
    """When it came into ``state``."""
    started: float
    loaded_s: float | None = None
    """How long it took from start to ready."""
    address: str = ""
    """``host:port`` once the process listens."""
    route: RouteState = RouteState.NONE
    server: int | None = None
    """Index of its server in the model's slot at the edge."""
    up: bool = False
    """The edge's own word on the server."""
    in_flight: int = 0
    last_used: float = 0.0
    """The later of the edge's last session and the last time something was in flight."""
    orphaned_since: float | None = None
    """While LOADING: since when nobody has waited for it."""
    stop_reason: str = ""
    """Why it drains or stops: evicted, idle, unloaded, abandoned, failed, node-leaving."""


@dataclass(frozen=True)
class Waiter:
    """One open call to ``acquire``."""

    ticket: str
    model: str
    since: float
    deadline: float


@dataclass(frozen=True)
class Failure:
    """A model whose last load failed: nothing is tried before ``retry_at``."""

    count: int
    at: float
    retry_at: float
    reason: str
    """The engine's own last words."""


@dataclass(frozen=True)
class NodeKind:
    """What the controller may ask for: one of the site's node types."""

    name: str
    host_mib: int
    gpu_mib: tuple[int, ...]
    min_nodes: int
    max_nodes: int


@dataclass(frozen=True)
class Policy:
    """Numbers that the decisions use; from the site's ``Limits``."""

    kinds: tuple[NodeKind, ...] = ()
    slots: int = 64
    """Backends at the edge."""
    servers_per_slot: int = 8
    waiting_max: int = 1000
    abandoned_load_grace_s: float = 2.0
    block_idle_s: float = 300.0
    retry_first_s: float = 2.0
    """Back-off after a failed load: doubles from here ..."""
    retry_max_s: float = 300.0
    failures_per_wait: int = 3
    """After so many failed loads in a row the waiters get the engine's last words instead of another try."""
    load_guess_s: float = 60.0
    """Expected load time of a model never loaded here."""


@dataclass(frozen=True)
class Fleet:
    """All of it. Mappings are never changed in place."""

    policy: Policy
    epoch: int = 0
    """Of this controller's life; every command to an agent carries it, and agents drop those of an older one."""
    models: Mapping[str, Model] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    """Every name and alias -> the model's name."""
    nodes: Mapping[str, Node] = field(default_factory=dict)
    engines: Mapping[str, Engine] = field(default_factory=dict)
    waiters: Mapping[str, Waiter] = field(default_factory=dict)
    slots: Mapping[str, int] = field(default_factory=dict)
    """Model -> slot at the edge."""
    failures: Mapping[str, Failure] = field(default_factory=dict)
    load_s: Mapping[str, float] = field(default_factory=dict)
    """Model -> the last load's seconds, for ``eta_s``."""
    pinned: frozenset[str] = frozenset()
    """Never evicted, always wanted: from the catalog and from ``gateway models pin``."""
    wished: frozenset[str] = frozenset()
    """``gateway models load``: wanted once, until ready."""
    switches: int = 0
    """Evictions made so that another model could be loaded."""
    serial: int = 0
    """Source of engine ids, node ids and generations."""
    settled: bool = False
    """False from the start until agents and edge have reported; until then nothing is started or stopped."""
