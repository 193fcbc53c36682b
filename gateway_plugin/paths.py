"""Where things lie: the state folder (shared, kept) and the run folder (this node's own, sockets and PID files).

Every path of the gateway is spelled here and nowhere else. Both folders are 0700 and belong to the user: ``ownership``
looks at them and at all that is above them.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from gateway_plugin.files import write_private as write_private  # likewise
from gateway_plugin.ownership import demand_own, first_own
from gateway_plugin.ownership import private_folder as private_folder  # part of this module's interface


def default_state_root() -> Path:
    """``$GATEWAY_STATE``, else ``$XDG_STATE_HOME/gateway-plugin``, else ``~/.local/state/gateway-plugin``."""
    explicit = os.environ.get("GATEWAY_STATE")
    if explicit:
        return Path(explicit).expanduser().absolute()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "gateway-plugin"


def cache_root() -> Path:
    """For what can be made or looked up again: in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gateway-plugin"


def weights_root() -> Path:
    """Where prepared weights lie: ``$GATEWAY_WEIGHTS``, else in ``cache_root``."""
    explicit = os.environ.get("GATEWAY_WEIGHTS")
    if explicit:
        return Path(explicit).expanduser().absolute()
    return cache_root() / "models"


def runtime_home(runtime: str) -> Path:
    """The home folder of engines in the containers of ``runtime``, with their caches, in ``cache_root``. It is
    kept: what was compiled there need not be again."""
    return cache_root() / "homes" / runtime


_RUN_NAMES = 9
"""How many names for the run folder are tried: each takes another user a folder in /tmp to occupy."""


class _Below:
    """A path of a ``Layout`` (or ``ControllerFiles``): ``name`` in one of its folders."""

    def __init__(self, folder: str, name: str) -> None:
        self._folder = folder
        self._name = name

    def __get__(self, layout: object, owner: type) -> Path:
        folder: Path = getattr(layout, self._folder)
        return folder / self._name


@dataclass(frozen=True)
class ControllerFiles:
    """The files in a controller's folder."""

    folder: Path

    epoch = _Below("folder", "epoch")
    """The number of the last controller."""
    pins = _Below("folder", "wishes.json")
    """An administrator's changes to the catalog's pins."""
    cards = _Below("folder", "cards.json")
    """Model cards, as the last controller showed them."""
    learned = _Below("folder", "learned.json")
    """What the last controller had learned of its models: when they are requested, how long they load."""
    events = _Below("folder", "events.jsonl")
    """What happened to the fleet, for ``controller replay``."""
    events_before = _Below("folder", "events.1.jsonl")
    """The log before ``events``."""


@dataclass(frozen=True)
class Layout:
    """All paths of one gateway, from the path of its state folder.

    The run folder lies on the node's own disk (AF_UNIX paths end at 107 characters and do not work on every shared file
    system), its name follows from the user and the state folder, so that two gateways never share one.
    """

    state: Path

    @classmethod
    def of(cls, state: Path) -> Layout:
        """The layout of ``state`` (``~`` and relative paths are made absolute), which no other user can have put there.

        Raises:
            ServiceError: the folder, or one above it, is another user's or can be changed by one. Nothing was read.
        """
        return cls(demand_own(state.expanduser().absolute()))

    @property
    def run(self) -> Path:
        """``/tmp/gw-<uid>-<hash>``: sockets, PID files, engine records of this node.

        Where another user sits on that name: ``...-1`` and so on, the same for every process of this node.
        """
        digest = hashlib.sha256(str(self.state).encode()).hexdigest()[:8]
        name = f"gw-{os.getuid()}-{digest}"
        root = Path(os.environ.get("GATEWAY_RUN_ROOT", "/tmp"))
        return first_own((root / name, *(root / f"{name}-{number}" for number in range(1, _RUN_NAMES))))

    def make(self) -> None:
        """Create every folder, 0700."""
        for folder in (
            self.state,
            self.run,
            self.edge,
            self.tls,
            self.node,
            self.logs,
            self.engine_logs,
            self.blocks,
            self.block_scripts,
            self.leave_marks,
            self.block_cancels,
            self.engine_records,
            self.controller,
            self.ray_tables,
        ):
            private_folder(folder)

    # --- service ---
    service_json = _Below("state", "service.json")
    """What runs: site, catalog, ports, supervisor's PID and start."""
    supervisor_status = _Below("run", "supervisor.json")
    """Rewritten by the supervisor with every change: what it waits for, PIDs, restarts."""
    service_lock = _Below("state", "service.lock")
    """Locked by ``up`` and ``down`` while they change what runs."""
    supervisor_lock = _Below("run", "supervisor.lock")
    """Locked by the supervisor as long as it lives: there is one."""
    drain_request = _Below("run", "down.json")
    """What ``down`` asks of the supervisor before it signals it."""
    drain_progress = _Below("run", "drain.json")
    """How far the supervisor's drain is."""
    catalog_json = _Below("state", "catalog.json")
    """The catalog as the Serve application was given it."""
    catalog_of_file = _Below("state", "catalog-of-file.json")
    """The catalog as ``up`` last read it from the user's file; ``catalog.json`` differs after ``models apply``."""
    ray_token = _Below("node", "ray.token")
    ray_tables = _Below("run", "gcs")
    """GCS tables in RocksDB; local disk."""
    ray_temp = _Below("run", "ray")
    cluster_yaml = _Below("state", "cluster.yaml")
    """The autoscaler's configuration."""

    # --- keys ---
    keys_json = _Below("state", "keys.json")
    """Names, roles and SHA-256 of API keys."""
    admin_key = _Below("state", "admin.key")
    """The CLI's own admin key, in the clear, 0600."""

    # --- certificates ---
    tls = _Below("state", "tls")
    """Of the machine that the gateway runs on alone."""
    node = _Below("state", "node")
    """All the secrets that a block's node reads, and no others."""
    ray_ca = _Below("node", "ray-ca.pem")
    ray_ca_key = _Below("node", "ray-ca.key")
    ray_identity = _Below("run", "ray-tls")
    """The head's own certificate, key, and copy of the authority; a driver's too."""
    ca = _Below("node", "ca.pem")
    ca_key = _Below("tls", "ca.key")
    """What signs certificates; read by ``make_authority`` alone."""
    edge_identity = _Below("tls", "edge.pem")
    """Client certificate and key of the edge, one PEM."""
    agent_identity = _Below("node", "agent.pem")
    """Client certificate and key of node agents, one PEM."""
    engine_certificate = _Below("node", "engine.crt")
    engine_key = _Below("node", "engine.key")
    edge_secret = _Below("tls", "edge.secret")
    """What the edge shows to the ingress in ``x-gateway-edge``."""
    front_identity = _Below("tls", "front.pem")
    """Certificate and key of the front door, one PEM, where the site has no certificate of its own."""

    # --- edge ---
    edge = _Below("state", "edge")
    edge_config = _Below("edge", "haproxy.cfg")
    edge_script = _Below("edge", "refuse.lua")
    """How the edge refuses."""
    keys_map = _Below("edge", "keys.map")
    """SHA-256 of a key -> ``role:name``."""
    models_map = _Below("edge", "models.map")
    """Model name or alias -> slot."""
    slot_keys_map = _Below("edge", "slotkeys.map")
    """Slot -> key of the engines in it."""
    servers_state = _Below("edge", "servers.state")
    edge_socket = _Below("run", "edge.sock")
    """The edge's administration socket."""
    owner_door = _Below("run", "owner.sock")
    """The front door for the gateway's own user on its own machine: a Unix socket that no other user reaches."""
    inner_door = _Below("run", "inner.sock")
    """Where the ingress sends a request back through the edge."""
    cold_door = _Below("run", "cold.sock")
    """The slots' backup server, inside the edge: the way to the ingress."""
    ingress_socket = _Below("run", "ingress.sock")
    """Where the ingress itself listens, for the edge alone."""
    desk_socket = _Below("run", "desk.sock")
    """Where the desk listens, for the edge alone."""
    around_door = _Below("run", "around.sock")
    """Inside the edge: the way round an ingress that is away, to the engines of a model that is kept apart."""

    # --- blocks, engines, controller ---
    blocks = _Below("state", "blocks")
    block_scripts = _Below("blocks", "scripts")
    leave_marks = _Below("blocks", "leave")
    """A file named after each block that is to be gone: it is being ended, or its job is over."""
    ledger = _Below("blocks", "ledger.json")
    block_cancels = _Below("blocks", "cancel")
    """One file a block that is to be ended at once, from the controller to the pool."""
    engine_records = _Below("run", "engines")
    scratch = _Below("run", "scratch")
    """Temporary folders of engines in containers."""
    """One JSON file an engine of this node: PID, start, port, model."""
    controller = _Below("state", "controller")
    """What the controller keeps for the next one: ``ControllerFiles``."""

    @property
    def controller_files(self) -> ControllerFiles:
        """Those in ``controller``."""
        return ControllerFiles(self.controller)

    controller_lock = _Below("run", "controller.lock")
    """Locked by the controller as long as it lives: no other changes routes meanwhile."""

    # --- Globus Compute endpoints ---
    endpoints = _Below("state", "endpoints")
    """Their environment, records (``NAME.endpoint``), and a folder each."""
    functions = _Below("endpoints", "functions.json")
    """Functions that endpoints may run."""

    # --- logs ---
    logs = _Below("state", "logs")
    usage_log = _Below("logs", "usage.jsonl")
    pseudonyms = _Below("state", "pseudonyms.key")
    """Key of the users' pseudonyms in exported traces; made when it is first needed."""
    engine_logs = _Below("logs", "engines")
    supervisor_log = _Below("logs", "supervisor.log")
    edge_log = _Below("logs", "edge.log")
    head_log = _Below("logs", "ray-head.log")
    """What ``ray start`` says; Ray's own logs lie under ``ray_temp``."""
    deploy_log = _Below("logs", "deploy.log")
    controller_log = _Below("logs", "controller.log")
    ingress_log = _Below("logs", "ingress.log")
    desk_log = _Below("logs", "desk.log")


def block_folder(run: Path, name: str) -> Path:
    """Ray's temporary folder of block ``name``: short, because sockets lie deep in it (AF_UNIX: 107 characters)."""
    return run / f"b-{name.rsplit('-', 1)[-1]}"


def block_log(layout: Layout, name: str) -> Path:
    """The output of a block's job and of its ``ray start``."""
    return layout.logs / f"block-{name}.log"
