"""A site: one cluster (or laptop) that the plugin is installed on, as a Python value.

A site file is ordinary Python with one module-level ``site = Site(...)``. It contains what Parsl and Ray need to know
of the machines, and nothing about models.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from gateway_plugin.catalog_values import Frozen, matching
from gateway_plugin.errors import ConfigError

_TYPE_NAME = re.compile(r"[a-z][a-z0-9]{0,15}")
_ORIGIN = re.compile(
    r"(?:https?|app|capacitor|ionic|tauri|[a-z]{2,16}(?:-[a-z]{2,16})?-extension)"
    r"://(?:[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?|\[[0-9a-f:]{2,39}\])(?::[0-9]{1,5})?"
)
"""Schemes of web pages, of browser extensions, and of desktop programs built as web pages."""
_SITE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not bound to
"""Every address of the machine -> the one to reach it by from the machine itself."""


class NodeType(Frozen):
    """One node type: the Parsl provider of its blocks, and the resources of a node."""

    name: str
    provider: Any
    """A Parsl ``ExecutionProvider`` with one node a block."""
    cpus: int = Field(ge=1)
    gpus: int = Field(default=0, ge=0)
    gpu_memory_gib: float = Field(default=0.0, ge=0)
    """Memory of one GPU that engines may use."""
    engine_memory_gib: float = Field(default=0.0, ge=0)
    """Host memory that engines without a GPU may use together."""
    sleep_memory_gib: float | None = Field(default=None, ge=0)
    """Host memory for the weights of engines with GPUs that sleep or have slept. ``None``: measured on the node; 0: no
    engine sleeps. Beside ``engine_memory_gib``."""
    min_blocks: int = Field(default=0, ge=0)
    max_blocks: int = Field(default=1, ge=0)
    """If these two are not given, the provider's values of the same names count."""
    worker_init: str = ""
    """Shell lines run on the node before Ray starts: modules, virtual environment. A trap on EXIT runs when
    the block has ended."""
    engines_on_loopback: bool = False
    """Engines listen on 127.0.0.1: for blocks on the gateway's own machine."""
    node_address: str = "auto"
    """``auto``: the address that routes to the head. Else a shell expression that prints it, run after ``worker_init``;
    both see ``$HEAD`` (``IP:port`` of the Ray head), ``$NAME`` (the block's) and ``$PYTHON``."""

    @model_validator(mode="before")
    @classmethod
    def _blocks_of_the_provider(cls, given: Any) -> Any:
        """Take the number of blocks from the provider where the site does not set it."""
        provider = given.get("provider") if isinstance(given, Mapping) else None
        said = {name: getattr(provider, name, None) for name in ("min_blocks", "max_blocks")}
        taken = {name: number for name, number in said.items() if isinstance(number, int) and name not in given}
        return {**given, **taken} if taken else given

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not _TYPE_NAME.fullmatch(value) or value == "head":
            raise ValueError(f"a node type's name matches {_TYPE_NAME.pattern} and is not 'head', got {value!r}")
        return value

    @field_validator("provider")
    @classmethod
    def _provider(cls, value: Any) -> Any:
        for verb in ("submit", "status", "cancel"):
            if not callable(getattr(value, verb, None)):
                raise ValueError(f"expected a Parsl ExecutionProvider, got {type(value).__name__}")
        if getattr(value, "nodes_per_block", 1) != 1:
            raise ValueError("one block is one Ray node: nodes_per_block must be 1")
        return value

    @model_validator(mode="after")
    def _holds_something(self) -> NodeType:
        if self.gpus and not self.gpu_memory_gib:
            raise ValueError("gpu_memory_gib is needed where gpus is above 0")
        if not self.gpus and not self.engine_memory_gib:
            raise ValueError("either gpus or engine_memory_gib must be above 0")
        if self.min_blocks > self.max_blocks:
            raise ValueError(f"min_blocks ({self.min_blocks}) is above max_blocks ({self.max_blocks})")
        return self


QUEUE_MAX_S = 480.0
"""HAProxy orders what waits by 20 bits of milliseconds (1,048 s), half of them for what came before now."""


class Limits(Frozen):
    """Limits that a refusal names."""

    body_bytes: int = Field(default=32 * 1024 * 1024, ge=1024)
    held_bytes: int = Field(default=2 << 30, ge=1024)
    """Request bodies in the ingress's memory: of requests that wait for models, and of cold ones being answered."""
    held_bytes_per_key: int = Field(default=512 << 20, ge=1024)
    """The same for one key."""
    waiting_requests: int = Field(default=1000, ge=1)
    """Requests that may wait for models at a time, over all models."""
    relayed_requests: int = Field(default=1500, ge=1)
    """Requests that came while their model was not ready, at a time: waiting ones, and those answered through the
    ingress, until they end. At most what fits into its open files: half of ``ulimit -Hn``."""
    wait_s: float = Field(default=1800.0, gt=0)
    """How long one request may wait for its model."""
    max_wait_s: float = Field(default=60.0, gt=0)
    """A request waits no longer than this, or four load times of its model if that is more, while a GPU that could hold
    the model serves another one: then that one makes way. docs/switching.md has what it takes to keep this."""
    queued_requests: int = Field(default=1000, ge=1)
    """Requests that may wait at the edge for the engines of one model that is loaded, while these have as many as they
    take."""
    queue_s: float = Field(default=300.0, ge=1, le=QUEUE_MAX_S)
    """How long one request may wait there."""
    in_flight_per_key: int = Field(default=512, ge=1)
    requests_per_key_10s: int = Field(default=100_000, ge=1)
    abandoned_load_grace_s: float = Field(default=2.0, ge=0)
    """A load may be stopped for a model that needs its room this long after its last waiter left; else it continues."""


class Site(Frozen):
    """Where the gateway runs and what it may ask the scheduler for."""

    name: Annotated[str, matching(_SITE_NAME, f"a site's name matches {_SITE_NAME.pattern}")]
    node_types: tuple[NodeType, ...] = Field(min_length=1)
    bind: str = "127.0.0.1"
    """Address of the front door."""
    port: int = Field(default=8180, ge=1024, le=65535)
    certificate: Path | None = None
    """PEM file with certificate chain and key of the front door. ``None``: the gateway makes one, signed by its own
    authority, which callers verify with the file that ``gateway ca`` prints."""
    names: tuple[str, ...] = ()
    """Further names and addresses under which callers reach the front door (a DNS alias of several login nodes), for
    the certificate that the gateway makes."""
    plain_http: bool = False
    """The front door speaks HTTP without TLS, on loopback only. Callers then cannot distinguish the gateway from
    another program that took its port while it was down, and send it their keys and prompts: for a single-user
    machine."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may call the gateway from a browser: exact origins, as the browser writes them
    (``https://chat.example.org``, ``http://localhost:3000``). None by default. Each request still needs a key."""
    ray_port: int = Field(default=6390, ge=1024, le=65535)
    serve_port: int | None = None
    """Of earlier versions, and without effect: Serve listens on no port."""
    head_address: str = "auto"
    """Address of this machine that blocks can reach; ``auto``: that of the default route's interface."""
    head_interface: str = ""
    """Instead of an address: the network interface of this machine that has it (``hsn0``)."""
    needs_environment: tuple[str, ...] = ()
    """Environment variables without which no job can be submitted (the account to charge): ``gateway up`` refuses to
    start without them. Everything else works without, so that ``gateway down`` can be run in any shell."""
    block_idle_s: float = Field(default=200.0, ge=5)
    """How long a block without demand is kept that has no engine, or none awake."""
    block_unused_s: float | None = Field(default=1800.0, ge=5)
    """How long a block is kept whose models are loaded but not used: none in flight, no waiters, none pinned. It is
    released even if a model on it has a longer ``keep_alive`` (``-1``): a job is paid for whether used or not.
    ``None``: never, for machines without cost while idle."""
    last_block_idle_s: float = Field(default=3600.0, ge=0)
    """The last block of all is kept this long, empty or unused, where the two above would release it sooner: the next
    request then need not wait in the queue."""
    pending_idle_s: float = Field(default=120.0, ge=0)
    """How long a job without demand keeps its place in the queue."""
    drain_before_end_s: float = Field(default=300.0, ge=1)
    """Drain time: this long before a block leaves, its engines take no new request, and requests in flight have this
    long to end. At most a quarter of the walltime is used."""
    leave_before_end_s: float = Field(default=30.0, ge=5)
    """A block leaves by itself this long before its walltime ends: time for engines and Ray to end cleanly."""
    notice_s: float = Field(default=20.0, ge=0)
    """How long a block that is cancelled or preempted lets requests end before it leaves: less than the time between
    Slurm's SIGTERM and SIGKILL (``KillWait``, usually 30 s; a batch script gets no earlier signal, regardless of a
    partition's ``GraceTime``)."""
    sleep_once_loaded: bool = True
    """An engine that can sleep does so once, after loading, before it serves: its load takes longer by its first, slow
    sleep, and a model that needs its GPUs later waits for a quick one."""
    isolate_engines: Literal["auto", "required", "off"] = "auto"
    """Keep the gateway's secrets and yours from engines, by bubblewrap: on nodes that have it; ``required``: no engine
    starts without it."""
    queue_wait_max_s: float = Field(default=7 * 86400.0, ge=60)
    """Longest time a job may be pending before Ray gives it up."""
    weights_folder: Path | None = None
    """Where ``gateway models fetch`` puts weights from the hub, and engines look for them: a folder that nodes see by
    the same path, in the layout of the hub's cache. ``None``: the hub's own cache of the user who starts the
    gateway (``HF_HUB_CACHE``, ``HF_HOME``, else ``~/.cache/huggingface/hub``)."""
    fetch: Literal["by-command", "on-request", "by-engine"] = "by-command"
    """How weights from the hub reach ``weights_folder``: ``by-command``: by ``gateway models fetch`` alone, and a model
    whose weights are not there fails with that command as its reason; ``on-request``: by the gateway, on its own
    machine, when the model is asked for; ``by-engine``: engines load them from the hub themselves, for which nodes need
    the internet, and gated models a token in their environment."""
    switching: Literal["pressure", "lru"] = "pressure"
    """Which models get the room: ``lru`` is the plain least recently used of what is idle, for comparison."""
    limits: Limits = Limits()

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    "an origin is scheme, host and port as a browser writes them, such as 'https://chat.example.org' "
                    f"or 'http://localhost:3000': no path, no wildcard, lower case; got {origin!r}"
                )
        return value

    @field_validator("weights_folder")
    @classmethod
    def _whole_path(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        if not (folder := value.expanduser()).is_absolute():
            raise ValueError(f"expected a path in full, as nodes see it, got {str(value)!r}")
        return folder

    @model_validator(mode="after")
    def _consistent(self) -> Site:
        names = [node_type.name for node_type in self.node_types]
        if len(set(names)) != len(names):
            raise ValueError("node_types: two of them have the same name")
        if self.plain_http and self.bind not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError(f"bind={self.bind!r} is open to others: plain_http is for 127.0.0.1 only")
        if self.plain_http and self.certificate is not None:
            raise ValueError("give either plain_http or a certificate")
        if self.port == self.ray_port:
            raise ValueError("port and ray_port must differ")
        if self.head_interface and self.head_address != "auto":
            raise ValueError("give either head_address or head_interface")
        return self

    def demand_environment(self, environment: Mapping[str, str]) -> None:
        """Refuse to continue without the variables in ``needs_environment``. Raises ``ConfigError``."""
        for name in self.needs_environment:
            if not environment.get(name):
                raise ConfigError(
                    f"site {self.name}: the environment variable {name} is not set; 'export {name}=...' with the "
                    "account or project that jobs are charged to."
                )

    def node_type(self, name: str) -> NodeType:
        """The node type called ``name``. Raises ``ConfigError``."""
        for node_type in self.node_types:
            if node_type.name == name:
                return node_type
        raise ConfigError(f"site {self.name}: no node type is called {name!r}")


def load_site(reference: str) -> Site:
    """The site called ``reference``: a name in ``parsl_configs`` (``local``), ``package.module``, or a ``.py`` file.

    Raises:
        ConfigError: one line that names the file, the key and what was expected.
    """
    try:
        site = getattr(_load_module(reference), "site", None)
    except ConfigError:
        raise
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        what = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            what = "unknown key"
        raise ConfigError(f"{reference}: {error.title}{'.' + key if key else ''}: {what}") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a site is a program: any exception is a mistake in it
        raise ConfigError(f"{reference}: {_where(reference, error)}{what_went_wrong(error)}") from None
    if not isinstance(site, Site):
        raise ConfigError(f"{reference}: expected a module-level 'site = Site(...)'")
    return site


def _where(reference: str, error: BaseException) -> str:
    """The line of the site that an error came from: the last one of its own, not of a package that it called."""
    if isinstance(error, SyntaxError):
        name = "" if error.filename is None or _is_site(error.filename, reference) else f"{error.filename} "
        return f"{name}line {error.lineno}: " if error.lineno else name
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_site(frame.filename, reference)]
    return f"line {frames[-1].lineno}: " if frames else ""


def _is_site(file: str, reference: str) -> bool:
    if _is_path(reference):
        return Path(file) == _site_path(reference)
    return Path(file).with_suffix("").as_posix().endswith("/" + _module_name(reference).replace(".", "/"))


def what_went_wrong(error: BaseException) -> str:
    """The error in one line, with its type: a KeyError's text is only the key."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg}"
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _is_path(reference: str) -> bool:
    return reference.endswith(".py") or "/" in reference


def _site_path(reference: str) -> Path:
    return Path(reference).expanduser().resolve()


def _module_name(reference: str) -> str:
    return reference if "." in reference else f"parsl_configs.{reference}"


def _load_module(reference: str) -> Any:
    if _is_path(reference):
        path = _site_path(reference)
        if not path.is_file():
            raise ConfigError(f"{reference}: no such site file")
        spec = importlib.util.spec_from_file_location(f"gateway_site_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"{reference}: is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    name = _module_name(reference)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(f"{reference}: no such site; give a name in parsl_configs/ or a .py file") from None
        raise
