"""Commands of the core. Data only; ``serve.controller.performer`` carries them out and reports back with events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway_plugin.catalog import Model
from gateway_plugin.errors import GatewayError


@dataclass(frozen=True)
class Answer:
    """The one answer to a waiter: go (``None``), or the error."""

    ticket: str
    error: GatewayError | None = None


@dataclass(frozen=True)
class StartEngine:
    """To the node's agent. Outcome: ``EngineListening``/``EngineReady``, or ``EngineExited``."""

    engine: str
    node: str
    model: Model
    gpus: tuple[int, ...]
    slot: int
    """Its key is the slot's."""
    epoch: int
    sleep_mib: int = 0
    """Above 0: it sleeps once, after loading, before it is ready; it may take so much host memory for that."""


@dataclass(frozen=True)
class StopEngine:
    """To the node's agent: end the process group. Outcome: ``EngineExited``."""

    engine: str
    node: str
    epoch: int
    reason: str


@dataclass(frozen=True)
class SleepEngine:
    """To the node's agent: free its GPUs, keep its weights in host memory. Outcome: ``EngineAsleep``; or, in any doubt,
    its agent ends it: ``EngineExited``."""

    engine: str
    node: str
    epoch: int


@dataclass(frozen=True)
class WakeEngine:
    """To the node's agent: load its weights from host memory, onto the same GPUs, and check its answer. Outcome:
    ``EngineAwake``; or, in any doubt, its agent ends it: ``EngineExited``."""

    engine: str
    node: str
    epoch: int


@dataclass(frozen=True)
class OpenRoute:
    """To the edge: address, health up, state ready. Outcome: ``RouteOpened`` or ``RouteRefused``."""

    engine: str
    slot: int
    server: int
    address: str
    limit: int = 0
    """Requests that the edge sends to the engine at a time; more wait there. 0: no limit."""


@dataclass(frozen=True)
class DrainRoute:
    """To the edge: no new request. Outcome: ``RouteDrained`` or ``RouteRefused``; then its counters follow in
    ``EdgeSeen`` every 50 ms.

    At most one route command is under way for an engine, so outcomes are unambiguous and ordered.
    """

    engine: str
    slot: int
    server: int


@dataclass(frozen=True)
class CloseRoute:
    """To the edge: ``maint``. Outcome: ``RouteClosed`` or ``RouteRefused``."""

    engine: str
    slot: int
    server: int


@dataclass(frozen=True)
class SyncSlots:
    """To the edge: the models' slots and names; a slot that is new to its model gets a new key.

    ``names``: every name and alias -> slot. Models without a slot are not in it (they take the cold path).
    """

    names: Mapping[str, int]
    fresh: tuple[int, ...] = ()
    """Slots whose tenant changed: a new engine key."""
    apart: frozenset[str] = frozenset()
    """Names whose requests go through the ingress although an engine serves them: one died a moment ago."""


@dataclass(frozen=True)
class CreateAgent:
    """Ask Ray for one more node agent of this type; while pending, it makes the autoscaler submit a block."""

    node: str
    type: str
    block: str = ""
    """Given when the agent died and its node lives: create it again on this block or nowhere."""


@dataclass(frozen=True)
class KillAgent:
    """Release the node: it takes no other agent, this one ends, and the autoscaler cancels the idle block."""

    node: str
    block_goes: bool = True
    """Else its block is left to the next pending agent; the autoscaler cancels it if there is none."""


@dataclass(frozen=True)
class FetchWeights:
    """To the gateway's own machine: fetch the model's weights from the hub. Outcome: ``WeightsFetching``, in the end
    ``WeightsThere`` or ``WeightsMissing``."""

    model: Model


Effect = (
    Answer | StartEngine | StopEngine | SleepEngine | WakeEngine | OpenRoute | DrainRoute | CloseRoute | SyncSlots
    | CreateAgent | KillAgent | FetchWeights
)  # fmt: skip
