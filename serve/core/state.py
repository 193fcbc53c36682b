"""The controller's state: frozen values, changed only by ``serve.core.step``.

Memory is counted in whole MiB so that sums are exact. Times are seconds by the controller's steady clock
(``gateway_plugin.clock``), given as arguments, never read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from gateway_plugin.catalog import Model
from serve.core.callers import Asked, Caller, Next
from serve.core.events import FoundServer, Part, Requester, SeenBlock
from serve.core.habits import Habit
from serve.core.policy import Policy
from serve.core.spread import Spread


class EngineState(Enum):
    LOADING = "loading"
    """Its process was requested and has not answered a real request yet. Holds its memory."""
    READY = "ready"
    """It answered a real request; its route is open or being opened."""
    DRAINING = "draining"
    """Its route takes no new request; requests in flight go on. Can still be taken back (``READY``)."""
    FALLING_ASLEEP = "falling-asleep"
    """Its route is closed; ``SleepEngine`` was sent. Holds its GPUs' memory until its agent reports."""
    ASLEEP = "asleep"
    """Sleep level 1: its weights lie in host memory, its GPUs' memory is free. It wakes on the same GPUs only."""
    WAKING = "waking"
    """``WakeEngine`` was sent. Holds its GPUs' memory; no request is sent to it."""
    STOPPING = "stopping"
    """Its process is being ended. Holds its memory until the agent reports its exit."""


class RouteState(Enum):
    NONE = "none"
    OPENING = "opening"
    """The command was sent; the edge has not reported the server UP yet."""
    OPEN = "open"
    DRAINING = "draining"


class NodePhase(Enum):
    PENDING = "pending"
    """Its agent was created and waits for a block."""
    UP = "up"
    LEAVING = "leaving"
    """Takes no new engine; its engines drain; then its agent is killed and the block goes."""
    ORPHANED = "orphaned"
    """Its agent died, the node lives, a new agent was requested there. Takes no new engine and no command; its engines
    run on and keep their routes until the new agent reports."""


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
    """When its last engine to go went, if none has started since; while PENDING: since when no model has needed it."""
    drain_asked: bool = False
    """It is to leave: ``gateway blocks drain``, or its end is near; survives the death of its agent."""
    ends_at: float | None = None
    """When its block's walltime ends."""
    drain_at: float | None = None
    """From then on it is LEAVING: its end is near, or its block was cancelled."""
    half_at: float | None = None
    """Half of its useful time is over then: no measure against its end is taken earlier."""
    leave_at: float | None = None
    """Its block leaves then, by itself or by force: requests in flight are cut."""
    notice_until: float | None = None
    """Its block was cancelled from outside, and ends then."""
    ending: bool = False
    """Near its end: its models are handed over to other nodes; new engines go elsewhere if they can."""
    joined_at: float | None = None
    """When its agent first reported, if this controller saw it."""
    free_host_mib: int = 0
    """Kept by ``serve.core.transaction``: ``host_mib`` less what its engines hold."""
    free_gpu_mib: tuple[int, ...] = ()
    """Kept by ``serve.core.transaction``, by index."""
    sleep_mib: int = 0
    """Host memory for the weights of engines that sleep or have slept; apart from ``host_mib``."""
    free_sleep_mib: int = 0
    """Kept by ``serve.core.transaction``."""
    engines: tuple[str, ...] = ()
    """Kept by ``serve.core.transaction``: ids of the engines on it."""


@dataclass(frozen=True)
class Engine:
    """One engine process and its route."""

    id: str
    """Never used twice."""
    model: str
    parts: tuple[Part, ...]
    """One or more; the first is its head, whose agent takes its commands."""
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
    """The server's state as the edge reports it."""
    in_flight: int = 0
    queued: int = 0
    """Requests that wait at the edge until it takes them."""
    can_sleep: bool = False
    """Its agent can put it to sleep and wake it."""
    sleep_mib: int = 0
    """Host memory that it holds since it first slept, awake or not; an upper bound until its agent reports."""
    slept: bool = False
    """It has slept once: ``sleep_mib`` is known, and each further sleep takes a second or two."""
    kept_mib: int = 0
    """Of each of its GPUs, what it holds while it sleeps."""
    stopped_asleep: bool = False
    """While STOPPING: it sleeps, and does not hold more than that."""
    awake_at: float = 0.0
    """When it was last woken."""
    last_used: float = 0.0
    """The later of the edge's last session and the last time something was in flight."""
    unwanted_since: float | None = None
    """While LOADING: since when there has been no demand."""
    stop_reason: str = ""
    """Why it drains, stops or falls asleep: evicted, idle, slot-needed, surplus, handed-over (these five can be taken
    back), unloaded, abandoned, failed, load-timeout, sleep-timeout, wake-timeout, sleep-memory, node-leaving,
    node-ends, catalog, over-committed, no-slot."""
    takes_over: bool = False
    """Another engine of its model is on a node that ends: its load goes on without demand."""
    stop_sent: bool = False
    """While STOPPING: the command was sent (not while its node is ORPHANED)."""
    slot: int | None = None
    """The slot at the edge that it was started for; its key is the slot's."""
    drained: bool = False
    """While its route is DRAINING: the edge acknowledged the drain (``RouteDrained``)."""
    drained_idle: bool = False
    """Counters read after that acknowledgement showed nothing in flight."""
    fresh_from: float = 0.0
    """Counters that the edge was asked for before this are stale and ignored."""
    granted_at: float = 0.0
    """When it became ready, or a request was last released to it, which may still be on its way."""
    refusals: int = 0
    """Times in a row that the edge refused a command for its route."""
    retry_at: float = 0.0
    """No command for its route before this."""
    stalled_since: float | None = None
    """Since when it has made no progress with ``still_with`` requests in flight, as its agent reports."""
    stalled_with: int = 0

    @property
    def node(self) -> str:
        """Its head's node."""
        return self.parts[0].node

    @property
    def devices(self) -> frozenset[tuple[str, int]]:
        """Every GPU of its parts: (node, index)."""
        return frozenset((part.node, gpu) for part in self.parts for gpu in part.gpus)

    def on(self, node: str) -> tuple[Part, ...]:
        """Its parts on ``node``."""
        return tuple(part for part in self.parts if part.node == node)


def reservation(engine: Engine) -> tuple[Part, ...]:
    """Memory held by an engine in its state: ``kept_mib`` of each GPU while it sleeps, else all of its parts until its
    process is gone. (Host memory for its weights, ``sleep_mib``, is counted apart.)"""
    if engine.state is not EngineState.ASLEEP and not engine.stopped_asleep:
        return engine.parts
    return tuple(replace(part, mib=engine.kept_mib) for part in engine.parts) if engine.kept_mib else ()


@dataclass(frozen=True)
class Waiter:
    """One open call to ``acquire``."""

    ticket: str
    model: str
    since: float
    deadline: float
    unattended: bool = False
    """No client waits: see ``serve.core.events.Acquire``."""
    requester: Requester = field(default_factory=Requester)


@dataclass(frozen=True)
class Apart:
    """Since and until when all requests of a model go through the ingress: one of its engines died in service."""

    since: float
    until: float
    opens: float = 0.0
    """No route to an engine of it is opened before."""


@dataclass(frozen=True)
class Failure:
    """A model whose last load failed: no load is tried before ``retry_at``."""

    count: int
    at: float
    retry_at: float
    reason: str
    """For administrators: ends with the engine's own last output."""
    after_ready: bool = False
    """The engine crashed shortly after becoming ready. Cleared once an engine stays up for ``crash_window_s``, or is
    evicted normally."""
    summary: str = "it failed"
    """For all users."""


@dataclass(frozen=True)
class Weights:
    """Weights of a model that are not on disk, or not whole."""

    reason: str
    """For all users."""
    detail: str
    """For administrators."""
    may_fetch: bool
    """The gateway fetches them when the model is wanted."""
    at: float
    """When this was reported."""
    fetching: bool = False
    done_bytes: int = 0
    total_bytes: int = 0
    bytes_s: float = 0.0


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


class Action(Enum):
    """A decision on one engine, or the decision to let a model wait."""

    LOAD = "load"
    WAKE = "wake"
    EVICT = "evict"
    """Its route drains so that another model gets its room."""
    SLEEP = "sleep"
    STOP = "stop"
    KEEP = "keep"
    """A drain is cancelled."""
    WAIT = "wait"
    """A model waits although its load would be possible: others weigh more, or nothing may be evicted yet."""


@dataclass(frozen=True)
class Decision:
    """One decision and its reason, for ``gateway models why`` and the event log."""

    at: float
    action: Action
    model: str
    because: str
    """A clause with its numbers, for administrators: no names of users."""
    engine: str = ""
    other: str = ""
    """The model for or against which it was made."""


DECISIONS_MAX = 512
"""``Fleet.decisions`` keeps the last ones."""


@dataclass(frozen=True)
class Weighed:
    """A waiting model weighed less than what would have to go for it."""

    at: float
    waits: bool
    """It waits for that room; else it has none, and a node may be asked for."""


class Cause(Enum):
    SUBMIT_REJECTED = "submit-rejected"
    """The scheduler rejects its jobs. Retried without end; waiters keep waiting."""
    CRASH_LOOP = "crash-loop"
    """Its jobs end as soon as they start. Not retried for a while; waiters that only it can serve are refused."""
    UNSCHEDULABLE = "unschedulable"
    """Its jobs pend for a reason that never clears. As with ``CRASH_LOOP``."""


@dataclass(frozen=True)
class NodeTypeBackoff:
    """Why a node type is not requested before ``retry_at``; after that, one node at a time until one joins."""

    cause: Cause
    count: int
    """Number of blocks in a row."""
    block: str
    """The last of them."""
    reason: str
    """Its last output, or the scheduler's message."""
    since: float
    retry_at: float

    @property
    def lasting(self) -> bool:
        """Whether waiters that need it are refused."""
        return self.cause is not Cause.SUBMIT_REJECTED


@dataclass(frozen=True)
class Fleet:
    """The whole state. Mappings are never changed in place."""

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
    weights: Mapping[str, Weights] = field(default_factory=dict)
    """By model: those that are not on disk, as far as is known."""
    load_s: Mapping[str, float] = field(default_factory=dict)
    """Model -> the last load's seconds, for ``eta_s``."""
    wake_s: Mapping[str, float] = field(default_factory=dict)
    """Model -> the last wake's seconds, from the command to the checked answer."""
    sleep_doubts: Mapping[str, int] = field(default_factory=dict)
    """Model -> times in a row that an engine of it was ended because its sleep or its waking went wrong."""
    drain_s: Mapping[str, float] = field(default_factory=dict)
    """Model -> how long its engines took to finish what was in flight: the longest, of late."""
    habits: Mapping[str, Habit] = field(default_factory=dict)
    """Model -> when it is requested. Kept by ``serve.core.handlers``."""
    callers: Mapping[str, Caller] = field(default_factory=dict)
    """Requester -> its last request that waited, the latest last (``serve.core.callers``)."""
    asked: Mapping[str, Asked] = field(default_factory=dict)
    """Model -> who asked it last; without a row that is not known."""
    follows: Mapping[str, Next] = field(default_factory=dict)
    """Model -> the models that the same requester asked next."""
    room_for: Mapping[str, float] = field(default_factory=dict)
    """Waiting model -> since when engines of others have been draining for it. Kept by
    ``serve.core.policies.placement``: until it loads, it comes before those that weigh more."""
    weighed: Mapping[str, Weighed] = field(default_factory=dict)
    """Waiting models that weighed less than what would have to go for them."""
    decisions: tuple[Decision, ...] = ()
    """The last ones, oldest first."""
    spreads: Mapping[str, Spread] = field(default_factory=dict)
    """Model with ``replicas_max`` above 1 -> how many engines its load calls for."""
    pinned: frozenset[str] = frozenset()
    """Never evicted, always wanted: from the catalog and from ``gateway models pin``."""
    requested_until: Mapping[str, float] = field(default_factory=dict)
    """Model -> until when it is wanted, or until it is ready: for ever by ``gateway models load``; for a client refused
    with Retry-After, until a while after that."""
    switches: int = 0
    """Evictions made so that another model could be loaded."""
    serial: int = 0
    """Source of engine ids and node ids."""
    settled: bool = False
    """False from the start until agents and edge have reported; until then nothing is started or stopped."""
    queues: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Index: model -> tickets of its waiters, oldest first."""
    model_engines: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Index: model -> ids of its engines."""
    moving: Mapping[str, EngineState] = field(default_factory=dict)
    """Index: the state of every engine but those that are READY with an OPEN route, or ASLEEP."""
    closing: Mapping[str, ClosingRoute] = field(default_factory=dict)
    """By engine id: servers on their way to ``maint``."""
    agent_failures: Mapping[str, Failure] = field(default_factory=dict)
    """Node types whose last agent could not be created."""
    unsettled: frozenset[str] = frozenset()
    """Nodes found at the start that have not reported yet."""
    found: tuple[FoundServer, ...] = ()
    """Servers found at the start without a matching engine so far."""
    started_at: float = 0.0
    """When ``Started`` came."""
    blocks: Mapping[str, SeenBlock] = field(default_factory=dict)
    """By name: every block in the ledger, the latest ended ones included."""
    queue_wait_s: Mapping[str, float] = field(default_factory=dict)
    """Node type -> the longest queue time of its last jobs that started."""
    block_start_s: Mapping[str, tuple[tuple[str, float], ...]] = field(default_factory=dict)
    """Node type -> (node, seconds from its job's start until its agent reported), of the last few."""
    apart: Mapping[str, Apart] = field(default_factory=dict)
    """By model. Kept by ``serve.core.policies.apart``."""
    backoffs: Mapping[str, NodeTypeBackoff] = field(default_factory=dict)
    """By node type: why it is not requested. Kept by ``serve.core.policies.backoff``."""
    reset_at: Mapping[str, float] = field(default_factory=dict)
    """By node type: time of the administrator's last retry; earlier failures of its blocks do not count."""
    storage: str = ""
    """Why the state folder cannot be written, for all users; empty if it can."""
    joined_blocks: frozenset[str] = frozenset()
    """Blocks of the ledger whose nodes joined in this controller's life."""


def live(engine: Engine) -> bool:
    """It serves its model or is going to."""
    return engine.state in (EngineState.LOADING, EngineState.READY, EngineState.WAKING)


def ready_at(engine: Engine) -> float:
    """When it became ready, or was last woken."""
    loaded_at, awake_at = engine.started + (engine.loaded_s or 0.0), engine.awake_at
    return loaded_at if loaded_at >= awake_at else awake_at


def serving(engine: Engine) -> bool:
    """A request sent to the edge now reaches it."""
    return engine.state is EngineState.READY and engine.route is RouteState.OPEN and engine.up


def stalled(engine: Engine) -> bool:
    """It serves, as far as the edge reports, and makes no progress."""
    return (
        engine.stalled_since is not None
        and engine.state is EngineState.READY
        and engine.route is not RouteState.OPENING
    )


def sleeps(engine: Engine) -> bool:
    """It sleeps or is falling asleep: no request reaches it, and nothing of it has to end first."""
    return engine.state in (EngineState.FALLING_ASLEEP, EngineState.ASLEEP)


def stays(node: Node) -> bool:
    """It takes new engines, and its end is not near."""
    return node.phase is NodePhase.UP and not node.ending


def had_requests(engine: Engine) -> bool:
    """Whether a request was released to it, or seen on it, since it was ready."""
    return engine.in_flight > 0 or max(engine.granted_at, engine.last_used) > ready_at(engine)


def used_at(engine: Engine) -> float:
    """When it was last used, or became ready."""
    return max(engine.last_used, ready_at(engine))
