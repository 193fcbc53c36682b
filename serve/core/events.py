"""Events of the fleet. Each is one fact, reported by the part that owns it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from gateway_plugin.catalog import Model
from gateway_plugin.phases import BlockPhase


@dataclass(frozen=True)
class Part:
    """One node's share of an engine: ``mib`` on each of ``gpus`` (by index), or of the host where there are none."""

    node: str
    gpus: tuple[int, ...]
    mib: int


@dataclass(frozen=True)
class FoundEngine:
    """An engine process of an agent, reported after (re)connecting."""

    id: str
    model: str
    gpus: tuple[int, ...]
    memory_mib: int
    started: float
    address: str
    ready: bool
    """It answered a real request."""
    loaded_s: float | None = None
    asleep: bool = False
    """It sleeps: its GPUs are free, its weights lie in host memory."""
    can_sleep: bool = False
    sleep_mib: int = 0
    """As in ``EngineAsleep``; 0 if it has never slept."""
    kept_mib: int = 0
    """As in ``EngineAsleep``."""
    under_way: Literal["", "sleep", "wake"] = ""
    """It is being put to sleep, or woken: neither ``ready`` nor ``asleep``."""


@dataclass(frozen=True)
class FoundServer:
    """A server that the edge has open or draining."""

    slot: int
    server: int
    address: str
    up: bool
    draining: bool
    in_flight: int
    idle_s: float
    """Seconds since its last session began; -1 if there was none."""


@dataclass(frozen=True)
class Started:
    """A controller began its life. ``slots`` and ``servers``: the edge's tables; ``nodes``: the agents found alive."""

    epoch: int
    slots: Mapping[str, int]
    servers: tuple[FoundServer, ...]
    nodes: tuple[str, ...]
    pinned: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()
    """Models whose requests the edge sends to the ingress, with or without engines."""


@dataclass(frozen=True)
class CatalogChanged:
    """The present catalog, whole."""

    models: tuple[Model, ...]
    adapted: frozenset[str] = frozenset()
    """Engines that serve their entry's adapters in it already, without having been loaded again."""


@dataclass(frozen=True)
class NodeJoined:
    """An agent is up (or was found again) and reports its node's memory and engines."""

    node: str
    type: str
    block: str
    address: str
    host_mib: int
    gpu_mib: tuple[int, ...]
    engines: tuple[FoundEngine, ...] = ()
    sleep_mib: int = 0
    """Host memory for the weights of engines that sleep or have slept."""


@dataclass(frozen=True)
class NodeGone:
    """An agent died or became unreachable. ``node_alive``: only the agent died, its node is still there."""

    node: str
    reason: str
    node_alive: bool = False


@dataclass(frozen=True)
class NodeFailed:
    """A requested agent could not be created."""

    node: str
    reason: str


@dataclass(frozen=True)
class EngineListening:
    engine: str
    address: str


@dataclass(frozen=True)
class EngineReady:
    """It answered one real request. ``load_s``: from start of the process; ``max_model_len``: its context length in
    tokens, prompt and answer together, ``None`` if not reported; ``can_sleep``: its agent can put it to sleep."""

    engine: str
    address: str
    load_s: float
    max_model_len: int | None = None
    can_sleep: bool = False
    sleep_mib: int = 0
    """As in ``EngineAsleep``, if it slept once after loading."""
    used_mib: int = 0
    """What it holds of each of its GPUs, or of the host where it has none; 0: not known."""
    kv_tokens: int = 0
    """Tokens that its cache of keys and values has room for; 0: not known."""


@dataclass(frozen=True)
class EngineGrew:
    """It holds more than was reported. ``used_mib``: as in ``EngineReady``."""

    engine: str
    used_mib: int


@dataclass(frozen=True)
class EngineAsleep:
    """It sleeps, its GPUs are free. ``sleep_mib``: host memory that it holds from now on, awake too, until it exits;
    ``kept_mib``: what it still holds of each of its GPUs."""

    engine: str
    sleep_mib: int
    took_s: float
    kept_mib: int = 0


@dataclass(frozen=True)
class EngineAwake:
    """It was woken and answers as it did before it slept. ``took_s``: from the command to the checked answer."""

    engine: str
    took_s: float


@dataclass(frozen=True)
class EngineStalled:
    """It has work (``in_flight`` by its own count, where it has one) and has made no progress for ``still_s``.

    Reported repeatedly until it makes progress or is ended.
    """

    engine: str
    still_s: float
    in_flight: int


@dataclass(frozen=True)
class EngineMoves:
    """It was stalled, and makes progress again."""

    engine: str


@dataclass(frozen=True)
class EngineExited:
    """Its process is gone (requested or not), its memory free."""

    engine: str
    reason: str
    """For administrators: ends with its last output if it failed."""
    expected: bool
    summary: str = ""  # for all users: how it ended, without its last output
    doubt: bool = False
    """Its agent ended it because its sleep or its waking went wrong."""


@dataclass(frozen=True)
class RouteOpened:
    """The edge itself reports the server UP."""

    engine: str


@dataclass(frozen=True)
class RouteRefused:
    """The edge did not accept the command (open, drain or close), or the server did not come UP in time."""

    engine: str
    reason: str


@dataclass(frozen=True)
class RouteDrained:
    """The edge accepted ``DrainRoute``: no new request from here on. Only counters requested after this count."""

    engine: str


@dataclass(frozen=True)
class RouteClosed:
    """The server is in ``maint`` and its place free."""

    engine: str


@dataclass(frozen=True)
class ServerSeen:
    engine: str
    up: bool
    in_flight: int
    last_used: float  # 0 if never
    queued: int = 0
    """Requests that wait at the edge until it takes them."""


@dataclass(frozen=True)
class EdgeSeen:
    """Counters read from the edge: all of them once a second, draining ones every 50 ms. ``read_at``: the controller's
    clock just before the query; a count read before a drain must not end it."""

    servers: tuple[ServerSeen, ...]
    read_at: float


class Priority(StrEnum):
    """Class of a request's priority."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


@dataclass(frozen=True)
class Requester:
    """The requester: tags of its key and, behind an endpoint's key, of the caller; else empty.

    Equal for equal keys and callers, and no names, as headers that the edge sends with a request may reach an engine.
    """

    key: str = ""
    caller: str = ""
    priority: Priority = Priority.INTERACTIVE


@dataclass(frozen=True)
class Acquire:
    """A request waits for ``model`` (a name or an alias)."""

    ticket: str
    model: str
    wait_s: float
    not_routed: bool = False
    """It was released before and the edge had no usable server."""
    unattended: bool = False
    """No client waits for it: the request came with a wait of 0, and may come again."""
    requester: Requester = Requester()
    deadline_s: float | None = None
    """How long its client waits at most, if it said so: refused at once where the model is expected to take longer."""


@dataclass(frozen=True)
class WaiterLeft:
    """Its client is gone."""

    ticket: str


@dataclass(frozen=True)
class GatewayCloses:
    """The gateway shuts down: all waiters are refused."""


@dataclass(frozen=True)
class ModelAnswered:
    """An engine of this model (a name or an alias) answered a request, the first since one died."""

    model: str


@dataclass(frozen=True)
class SuspectsKept:
    """The ingress has requests that may have killed an engine of this model (a name or an alias), or remembers some."""

    model: str


@dataclass(frozen=True)
class LoadAsked:
    """``gateway models load``."""

    model: str


@dataclass(frozen=True)
class UnloadAsked:
    """``gateway models unload``: drained, stopped, its pin and demand dropped; its waiters are refused."""

    model: str


@dataclass(frozen=True)
class PinChanged:
    model: str
    pinned: bool


@dataclass(frozen=True)
class NodeDrainAsked:
    """``gateway blocks drain``."""

    node: str


@dataclass(frozen=True)
class BlockCancelAsked:
    """``gateway blocks cancel``: the pool ends the block's job, with requests in flight or without."""

    block: str


@dataclass(frozen=True)
class SeenBlock:
    """A block of the ledger. Times are seconds since the epoch, ``None`` where not known."""

    name: str
    type: str
    phase: BlockPhase
    asked_at: float
    job: str | None = None  # the scheduler's id
    reason: str | None = None
    """Why it pends or how it ended, as the scheduler reports it."""
    host: str | None = None  # the machine that it runs or ran on
    starts_at: float | None = None
    """When its job started; of a pending one, when the scheduler expects it to."""
    ends_at: float | None = None  # end of its walltime
    ended_at: float | None = None
    never_clears: bool = False
    """It pends for a reason that waiting does not clear: the job or the site's rules must change."""


@dataclass(frozen=True)
class BlocksSeen:
    """The ledger was read and has changed: all of its blocks, the latest ended ones included."""

    blocks: tuple[SeenBlock, ...]


@dataclass(frozen=True)
class NodeLeaves:
    """The node's block is being ended from outside (``scancel``, preemption) and has until ``until``."""

    node: str
    until: float
    """Seconds since the epoch; its engines are ended then, even with requests in flight."""
    reason: str


@dataclass(frozen=True)
class NodeTypeRetryAsked:
    """``gateway blocks retry``: blocks of this type may be requested again, in spite of earlier failures."""

    type: str


@dataclass(frozen=True)
class StorageSeen:
    """Whether the state folder can be written."""

    backoff: str
    """Why not, for all users; empty if it can."""


@dataclass(frozen=True)
class WeightsMissing:
    """The weights of a model are not on disk, or not whole. Reported once, and when it changes."""

    model: str
    reason: str
    """For all users."""
    detail: str = ""
    """For administrators; ``""``: the same."""
    may_fetch: bool = False
    """The gateway fetches them when the model is wanted (``FetchWeights``)."""


@dataclass(frozen=True)
class WeightsFetching:
    """How far a fetch is. ``total_bytes`` 0: not known yet; ``bytes_s``: its rate of late, 0: not known."""

    model: str
    done_bytes: int
    total_bytes: int
    bytes_s: float = 0.0


@dataclass(frozen=True)
class WeightsThere:
    """The weights of a model, which were missing, are on disk."""

    model: str


@dataclass(frozen=True)
class Tick:
    """Time passed; deadlines are checked."""


Event = (
    Started | CatalogChanged | NodeJoined | NodeGone | NodeFailed | EngineListening | EngineReady | EngineAsleep
    | EngineAwake | EngineGrew | EngineStalled | EngineMoves | EngineExited | RouteOpened | RouteRefused
    | RouteDrained | RouteClosed | EdgeSeen | Acquire | WaiterLeft | GatewayCloses | ModelAnswered | SuspectsKept
    | LoadAsked | UnloadAsked | PinChanged | NodeDrainAsked | BlockCancelAsked | BlocksSeen | NodeLeaves
    | NodeTypeRetryAsked | StorageSeen | WeightsMissing | WeightsFetching | WeightsThere | Tick
)  # fmt: skip
