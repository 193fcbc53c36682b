"""What the command line of an engine is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gateway_plugin.catalog import Model
from gateway_plugin.engine_options import adapters
from gateway_plugin.weights import split_revision


@dataclass(frozen=True)
class TlsFiles:
    """TLS files of an engine, and the authority of the clients that it accepts."""

    key: Path
    certificate: Path
    authority: Path


@dataclass(frozen=True)
class Bind:
    """Where an engine listens: at a host and a port, or on a Unix socket."""

    host: str
    port: int
    socket: str = ""
    """Path of the Unix socket; ``""``: none."""

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Start:
    """One start of an engine."""

    model: Model
    source: str
    """The weights, resolved: a folder or a hub name."""
    bind: Bind
    tls: TlsFiles
    python: str
    """The interpreter of its runtime."""
    gpu_total_mib: int = 0
    """Physical memory of one GPU; 0 if unknown or none. Some engines take their share as a fraction of it."""
    sleeps: bool = False
    """It can be put to sleep."""

    @property
    def name(self) -> str:
        """The folder, or the hub name without its revision."""
        return split_revision(self.source)[0]

    @property
    def revision(self) -> str:
        """The revision of a hub name; ``""``: none."""
        return split_revision(self.source)[1]

    @property
    def served(self) -> tuple[str, ...]:
        """The base model's names. vLLM does not start if an adapter has one of these; it serves adapters' anyway."""
        own = {*adapters((*self.model.command, *self.model.args)), *(self.model.adapters or ())}
        return tuple(name for name in self.model.names if name not in own)

    def share(self, most: float) -> float | None:
        """The model's memory as a fraction of one GPU's, at most ``most``; ``None``: not known."""
        return min(most, self.model.memory_mib / self.gpu_total_mib) if self.gpu_total_mib else None
