"""What the controller knows: frozen values, changed only by ``serve.core.step``.

Memory is counted in whole MiB so that sums are exact. Times are seconds by the controller's clock, which nobody sets
(``gateway_plugin.clock``), given as arguments, never read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from gateway_plugin.catalog import Model
from serve.core.events import FoundServer, SeenBlock
from serve.core.policy import Policy


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
    ORPHANED = "orphaned"
    """Its agent died, the node lives, a new agent was asked for there. Takes no new engine and no command; the engines
    that it had run on and keep their routes until the new agent says what exists."""


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
    """Since when it has held no engine; while PENDING: since when nobody has needed it."""
    drain_asked: bool = False
    """It is to leave: ``gateway blocks drain``, or its end is near; survives the death of its agent."""
    ends_at: float | None = None
    """When its block's walltime ends."""
    drain_at: float | None = None
    """From then on it is LEAVING: its end is near, or its block was told to end."""
    half_at: float | None = None
    """Half of its useful time is over then: nothing is done earlier for fear of its end."""
    leave_at: float | None = None
    """Its block leaves then, by itself or because it must: what is in flight is cut."""
    notice_until: float | None = None
    """Its block was told to end by somebody else, and has until then."""
    ending: bool = False
    """Its end is so near that what it serves is handed over to others; new engines go elsewhere if they can."""
    joined_at: float | None = None
    """When its agent first reported, if it was seen to."""
    free_host_mib: int = 0
    """Kept by ``serve.core.change``: ``host_mib`` less what its engines hold."""
    free_gpu_mib: tuple[int, ...] = ()
    """Kept by ``serve.core.change``, by index."""
    engines: tuple[str, ...] = ()
    """Kept by ``serve.core.change``: ids of the engines on it."""


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
    """Why it drains or stops: evicted, idle, handed-over (these three can be taken back), unloaded, abandoned, failed,
    load-timeout, node-leaving, node-ends, catalog, over-committed, no-slot."""
    takes_over: bool = False
    """Another engine of its model is on a node that ends: its load goes on though nobody waits for it."""
    stop_sent: bool = False
    """While STOPPING: the agent was told (it cannot be while its node is ORPHANED)."""
    slot: int | None = None
    """The slot at the edge that it was started for; its key is the slot's."""
    drained: bool = False
    """While its route is DRAINING: the edge acknowledged the drain (``RouteDrained``)."""
    quiet: bool = False
    """Counters read after that acknowledgement said that nothing is in flight."""
    fresh_from: float = 0.0
    """Counters that the edge was asked for before this are stale and ignored."""
    answered_at: float = 0.0
    """When it became ready or a waiter was last told to go to it: that request may still be on its way."""
    refusals: int = 0
    """Times in a row that the edge refused a command for its route."""
    retry_at: float = 0.0
    """No command for its route before this."""
    still_since: float | None = None
    """Since when it has made no progress with ``still_with`` requests in flight, as its agent says."""
    still_with: int = 0


@dataclass(frozen=True)
class Waiter:
    """One open call to ``acquire``."""

    ticket: str
    model: str
    since: float
    deadline: float
    unattended: bool = False
    """No client waits: see ``serve.core.events.Acquire``."""


@dataclass(frozen=True)
class Apart:
    """Since and until when all requests of a model go through the ingress: one of its engines died in service."""

    since: float
    until: float
    opens: float = 0.0
    """No route to an engine of it is opened before."""


@dataclass(frozen=True)
class Failure:
    """A model whose last load failed: nothing is tried before ``retry_at``."""

    count: int
    at: float
    retry_at: float
    reason: str
    """For administrators: ends with the engine's own last words."""
    after_ready: bool = False
    """It died soon after it was ready; forgotten when one stays up for ``crash_window_s`` or makes room in peace."""
    summary: str = "it failed"
    """For everybody."""


@dataclass(frozen=True)
class ClosingRoute:
    """A server at the edge whose engine is gone or going. Its place is free after ``RouteClosed``."""

    engine: str
    slot: int
    server: int
    since: float
    pending: bool
    """An earlier command for it has not been acknowledged; ``CloseRoute`` must not overtake it."""
    asked: bool = False
    retry_at: float = 0.0


class Cause(Enum):
    REFUSED = "refused"
    """The scheduler refuses its jobs. Asked for again and again, waiters wait on."""
    DYING = "dying"
    """Its jobs end as soon as they start. Left alone for a while; who can be served by no other kind is refused."""
    STUCK = "stuck"
    """Its jobs pend for a reason that never clears. As with ``DYING``."""


@dataclass(frozen=True)
class Trouble:
    """Why a kind is not asked for before ``retry_at``; after that, one node at a time until one is had."""

    cause: Cause
    count: int
    """How many blocks in a row."""
    block: str
    """The last of them."""
    reason: str
    """Its last words, or the scheduler's."""
    since: float
    retry_at: float

    @property
    def lasting(self) -> bool:
        """Whether waiting for it makes no sense."""
        return self.cause is not Cause.REFUSED


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
    wished: Mapping[str, float] = field(default_factory=dict)
    """Model -> until when it is wanted, or until it is ready: for ever by ``gateway models load``; where a client was
    refused with a time at which to come back, until a while after that."""
    switches: int = 0
    """Evictions made so that another model could be loaded."""
    serial: int = 0
    """Source of engine ids, node ids and generations."""
    settled: bool = False
    """False from the start until agents and edge have reported; until then nothing is started or stopped."""
    queues: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Index: model -> tickets of its waiters, oldest first."""
    model_engines: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Index: model -> ids of its engines."""
    closing: Mapping[str, ClosingRoute] = field(default_factory=dict)
    """By engine id: servers on their way to ``maint``."""
    kind_failures: Mapping[str, Failure] = field(default_factory=dict)
    """Node types whose last agent could not be created."""
    unsettled: frozenset[str] = frozenset()
    """Nodes found at the start that have not reported yet."""
    found: tuple[FoundServer, ...] = ()
    """Servers found at the start that no engine was matched to yet."""
    started_at: float = 0.0
    """When ``Started`` came."""
    blocks: Mapping[str, SeenBlock] = field(default_factory=dict)
    """By name: what the ledger says of every block, those that ended lately too."""
    queue_wait_s: Mapping[str, float] = field(default_factory=dict)
    """Node type -> the longest that one of its jobs that started lately had waited."""
    block_start_s: Mapping[str, tuple[tuple[str, float], ...]] = field(default_factory=dict)
    """Node type -> (node, seconds from its job's start until its agent reported), of the last few."""
    apart: Mapping[str, Apart] = field(default_factory=dict)
    """By model. Kept by ``serve.core.apart``."""
    troubles: Mapping[str, Trouble] = field(default_factory=dict)
    """By kind: why it is not asked for. Kept by ``serve.core.troubles``."""
    forgiven: Mapping[str, float] = field(default_factory=dict)
    """By kind: when an administrator last asked for a retry; what its blocks did before does not count."""
    storage: str = ""
    """Why the state folder cannot be written, for everybody; empty if it can."""
    joined_blocks: frozenset[str] = frozenset()
    """Blocks of the ledger whose nodes joined in this controller's life."""


def live(engine: Engine) -> bool:
    """It serves its model or is going to."""
    return engine.state in (EngineState.LOADING, EngineState.READY)


def ready_at(engine: Engine) -> float:
    """When it became ready."""
    return engine.started + (engine.loaded_s or 0.0)


def serving(engine: Engine) -> bool:
    """A request sent to the edge now finds it."""
    return engine.state is EngineState.READY and engine.route is RouteState.OPEN and engine.up


def stalled(engine: Engine) -> bool:
    """It serves, as far as the edge knows, and does not move."""
    return (
        engine.still_since is not None and engine.state is EngineState.READY and engine.route is not RouteState.OPENING
    )


def stays(node: Node) -> bool:
    """It takes new engines, and its end is not near."""
    return node.phase is NodePhase.UP and not node.ending


def had_requests(engine: Engine) -> bool:
    """Somebody was told to go to it, or something seen on it, since it was ready."""
    return engine.in_flight > 0 or max(engine.answered_at, engine.last_used) > ready_at(engine)


def used_at(engine: Engine) -> float:
    """When it was last used, or became ready."""
    return max(engine.last_used, ready_at(engine))
