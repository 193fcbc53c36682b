"""Where things lie: the state folder (shared, kept) and the run folder (this node's own, sockets and PID files).

Every path of the gateway is spelled here and nowhere else. Both folders are 0700 and belong to the user: ``ownership``
looks at them and at all that is above them.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from gateway_plugin.ownership import demand_own, first_own
from gateway_plugin.ownership import private_folder as private_folder  # part of this module's interface
from gateway_plugin.state_file import write_private as write_private  # likewise


def default_state_root() -> Path:
    """``$GATEWAY_STATE``, else ``$XDG_STATE_HOME/gateway-plugin``, else ``~/.local/state/gateway-plugin``."""
    explicit = os.environ.get("GATEWAY_STATE")
    if explicit:
        return Path(explicit).expanduser().absolute()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "gateway-plugin"


def weights_root() -> Path:
    """Where prepared weights lie: ``$GATEWAY_WEIGHTS``, else in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    explicit = os.environ.get("GATEWAY_WEIGHTS")
    if explicit:
        return Path(explicit).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gateway-plugin" / "models"


_RUN_NAMES = 9
"""How many names for the run folder are tried: each takes another user a folder in /tmp to occupy."""


@dataclass(frozen=True)
class Layout:
    """All paths of one gateway, from the path of its state folder.

    The run folder lies on the node's own disk (AF_UNIX paths end at 107 characters and do not work on every shared file
    system), its name follows from the user and the state folder, so that two gateways never share one.
    """

    state: Path

    @classmethod
    def of(cls, state: Path) -> Layout:
        """The layout of ``state`` (``~`` and relative paths are made absolute), which nobody else can have put there.

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
    @property
    def service_json(self) -> Path:
        """What runs: site, catalog, ports, supervisor's PID and start."""
        return self.state / "service.json"

    @property
    def supervisor_status(self) -> Path:
        """Rewritten by the supervisor with every change: what it waits for, PIDs, restarts."""
        return self.run / "supervisor.json"

    @property
    def catalog_json(self) -> Path:
        """The catalog as the Serve application was given it."""
        return self.state / "catalog.json"

    @property
    def catalog_of_file(self) -> Path:
        """The catalog as ``up`` last read it from the user's file; ``catalog.json`` differs after ``models apply``."""
        return self.state / "catalog-of-file.json"

    @property
    def ray_token(self) -> Path:
        return self.node / "ray.token"

    @property
    def ray_tables(self) -> Path:
        """GCS tables in RocksDB; local disk."""
        return self.run / "gcs"

    @property
    def ray_temp(self) -> Path:
        return self.run / "ray"

    @property
    def cluster_yaml(self) -> Path:
        """The autoscaler's configuration."""
        return self.state / "cluster.yaml"

    # --- keys ---
    @property
    def keys_json(self) -> Path:
        """Names, roles and SHA-256 of API keys."""
        return self.state / "keys.json"

    @property
    def admin_key(self) -> Path:
        """The CLI's own admin key, in the clear, 0600."""
        return self.state / "admin.key"

    # --- certificates ---
    @property
    def tls(self) -> Path:
        """Of the machine that the gateway runs on alone."""
        return self.state / "tls"

    @property
    def node(self) -> Path:
        """All the secrets that a block's node reads, and no others."""
        return self.state / "node"

    @property
    def ray_ca(self) -> Path:
        return self.node / "ray-ca.pem"

    @property
    def ray_ca_key(self) -> Path:
        return self.node / "ray-ca.key"

    @property
    def ray_identity(self) -> Path:
        """The head's own certificate, key, and copy of the authority; a driver's too."""
        return self.run / "ray-tls"

    @property
    def ca(self) -> Path:
        return self.node / "ca.pem"

    @property
    def ca_key(self) -> Path:
        """What signs certificates; read by ``make_authority`` alone."""
        return self.tls / "ca.key"

    @property
    def edge_identity(self) -> Path:
        """Client certificate and key of the edge, one PEM."""
        return self.tls / "edge.pem"

    @property
    def agent_identity(self) -> Path:
        """Client certificate and key of node agents, one PEM."""
        return self.node / "agent.pem"

    @property
    def engine_certificate(self) -> Path:
        return self.node / "engine.crt"

    @property
    def engine_key(self) -> Path:
        return self.node / "engine.key"

    @property
    def serve_certificate(self) -> Path:
        return self.tls / "serve.crt"

    @property
    def serve_key(self) -> Path:
        return self.tls / "serve.key"

    @property
    def edge_secret(self) -> Path:
        """What the edge shows to the ingress in ``x-gateway-edge``."""
        return self.tls / "edge.secret"

    @property
    def front_identity(self) -> Path:
        """Certificate and key of the front door, one PEM, where the site has no certificate of its own."""
        return self.tls / "front.pem"

    # --- edge ---
    @property
    def edge(self) -> Path:
        return self.state / "edge"

    @property
    def edge_config(self) -> Path:
        return self.edge / "haproxy.cfg"

    @property
    def edge_script(self) -> Path:
        """How the edge refuses."""
        return self.edge / "refuse.lua"

    @property
    def keys_map(self) -> Path:
        """SHA-256 of a key -> ``role:name``."""
        return self.edge / "keys.map"

    @property
    def models_map(self) -> Path:
        """Model name or alias -> slot."""
        return self.edge / "models.map"

    @property
    def slot_keys_map(self) -> Path:
        """Slot -> key of the engines in it."""
        return self.edge / "slotkeys.map"

    @property
    def servers_state(self) -> Path:
        return self.edge / "servers.state"

    @property
    def edge_socket(self) -> Path:
        """The edge's administration socket."""
        return self.run / "edge.sock"

    @property
    def owner_door(self) -> Path:
        """The front door for the gateway's own user on its own machine: a Unix socket that nobody else reaches."""
        return self.run / "owner.sock"

    @property
    def inner_door(self) -> Path:
        """Where the ingress sends a request back through the edge."""
        return self.run / "inner.sock"

    @property
    def cold_door(self) -> Path:
        """The slots' backup server, inside the edge: the way to the ingress."""
        return self.run / "cold.sock"

    @property
    def ingress_socket(self) -> Path:
        """Where the ingress itself listens, for the edge alone."""
        return self.run / "ingress.sock"

    @property
    def around_door(self) -> Path:
        """Inside the edge: the way round an ingress that is away, to the engines of a model that is kept apart."""
        return self.run / "around.sock"

    # --- blocks, engines, controller ---
    @property
    def blocks(self) -> Path:
        return self.state / "blocks"

    @property
    def block_scripts(self) -> Path:
        return self.blocks / "scripts"

    @property
    def leave_marks(self) -> Path:
        """A file named after each block that is to be gone: it was told to end, or its job is over."""
        return self.blocks / "leave"

    @property
    def ledger(self) -> Path:
        return self.blocks / "ledger.json"

    @property
    def block_cancels(self) -> Path:
        """One file a block that is to be ended at once, from the controller to the pool."""
        return self.blocks / "cancel"

    @property
    def engine_records(self) -> Path:
        """One JSON file an engine of this node: PID, start, port, model."""
        return self.run / "engines"

    @property
    def controller(self) -> Path:
        """Recorded events (``events.jsonl``), pins and wishes (``wishes.json``)."""
        return self.state / "controller"

    @property
    def controller_lock(self) -> Path:
        """Locked by the controller as long as it lives: no other changes routes meanwhile."""
        return self.run / "controller.lock"

    # --- logs ---
    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def usage_log(self) -> Path:
        return self.logs / "usage.jsonl"

    @property
    def engine_logs(self) -> Path:
        return self.logs / "engines"

    @property
    def supervisor_log(self) -> Path:
        return self.logs / "supervisor.log"

    @property
    def edge_log(self) -> Path:
        return self.logs / "edge.log"

    @property
    def head_log(self) -> Path:
        """What ``ray start`` says; Ray's own logs lie under ``ray_temp``."""
        return self.logs / "ray-head.log"

    @property
    def deploy_log(self) -> Path:
        return self.logs / "deploy.log"

    @property
    def service_lock(self) -> Path:
        """Locked by ``up`` and ``down`` while they change what runs."""
        return self.state / "service.lock"

    @property
    def supervisor_lock(self) -> Path:
        """Locked by the supervisor as long as it lives: there is one."""
        return self.run / "supervisor.lock"


def block_folder(run: Path, name: str) -> Path:
    """Ray's temporary folder of block ``name``: short, because sockets lie deep in it (AF_UNIX: 107 characters)."""
    return run / f"b-{name.rsplit('-', 1)[-1]}"


def block_log(layout: Layout, name: str) -> Path:
    """The output of a block's job and of its ``ray start``."""
    return layout.logs / f"block-{name}.log"
