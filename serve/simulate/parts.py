"""Data types of the simulated world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from serve.core import effects as ef
from serve.core import events as ev
from serve.simulate.service import Service
from serve.simulate.times import PIN_GIB_PER_S, Times
from serve.simulate.traces import Request, Session


class Decider(Protocol):
    """In place of the controller: ``serve.simulate.deciders.Core``, or a baseline's own small loop."""

    def tell(self, event: ev.Event, now: float) -> tuple[ef.Effect, ...]:
        """Take an event; returns the effects."""
        ...


@dataclass(frozen=True)
class Fleet:
    """The devices: ``gpus`` in nodes of ``per_node``, the last one smaller if need be."""

    gpus: int = 16
    per_node: int = 8
    gpu_gib: float = 76.0
    host_gib: float = 0.0
    """Of each node, for the weights of engines that sleep or have slept; 0: nothing sleeps."""
    pin_gib_per_s: float = PIN_GIB_PER_S
    """How fast an engine's first sleep takes its host memory."""

    def nodes(self) -> dict[str, tuple[int, ...]]:
        """Node -> MiB of each of its GPUs."""
        mib = round(self.gpu_gib * 1024)
        sizes = [min(self.per_node, self.gpus - first) for first in range(0, self.gpus, self.per_node)]
        return {f"n{index}": (mib,) * size for index, size in enumerate(sizes)}


@dataclass(eq=False)
class Engine:
    id: str
    model: str
    node: str
    gpus: tuple[int, ...]
    mib: int
    """On each of its GPUs, unless it sleeps."""
    times: Times
    service: Service
    seen: Callable[[Engine], None]
    """Called before its state changes."""
    state: str = "loading"
    """loading, ready, draining, falling-asleep, asleep, waking or stopping."""
    since: float = 0.0
    open: bool = False
    """The edge sends requests to it."""
    draining: bool = False
    last_used: float = 0.0
    due: int = 0
    """Of the scheduled end of a request; an older one is void."""
    sleep_mib: int = 0
    """Host memory that it holds since it first slept, or may take for that."""
    slept: bool = False

    @property
    def places(self) -> list[tuple[str, int]]:
        """Its GPUs."""
        return [(self.node, gpu) for gpu in self.gpus]

    def becomes(self, state: str) -> None:
        if state != self.state:
            self.seen(self)
            self.state = state


@dataclass
class Pending:
    request: Request
    came: float
    loop: int | None = None
    """Its session."""
    began: float | None = None
    queued_at: float = 0.0
    """When it began to wait at the edge, if it did."""
    turns: int = 0
    """What its user had at its model then, with it; 0: it did not wait there."""


@dataclass
class Loop:
    session: Session
    next: int = 0
    open: int = 0
