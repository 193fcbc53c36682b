"""What the world is made of, as it really is: processes, agents, servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from serve.core import events as ev
from serve.core.effects import SleepEngine, StartEngine, StopEngine, WakeEngine

Command = StartEngine | StopEngine | SleepEngine | WakeEngine


@dataclass
class Process:
    """An engine process, as the operating system has it."""

    id: str
    model: str
    gpus: tuple[int, ...]
    memory_mib: int
    started: float
    address: str
    ready: bool = False
    stopping: bool = False
    sleep: Literal["", "sleep", "asleep", "wake"] = ""
    pinned_mib: int = 0
    """Host memory for its sleep: what it may take until it has slept once."""
    slept: bool = False

    @property
    def can_sleep(self) -> bool:
        return self.ready and bool(self.gpus)

    @property
    def kept_mib(self) -> int:
        """Of each of its GPUs, while it sleeps."""
        return self.memory_mib // 8 if self.slept else 0

    @property
    def most_mib(self) -> int:
        """Host memory that its first sleep may take."""
        return self.memory_mib * len(self.gpus)


@dataclass
class Agent:
    """A node's agent; ``word`` is what it said and nobody has heard yet."""

    id: str
    type: str
    up: bool = False
    processes: dict[str, Process] = field(default_factory=dict)
    word: list[ev.Event] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    gone: bool = False
    """Its machine is gone without a word; it never comes back."""
    until: float | None = None
    """Its block was told to end, and ends then."""

    @property
    def block(self) -> str:
        return f"block-{self.id}"


@dataclass
class Server:
    """One server at the edge."""

    address: str
    state: str = "ready"
    """``ready`` or ``drain``; in ``maint`` it is left out."""
    in_flight: int = 0
    last: float = -1.0
