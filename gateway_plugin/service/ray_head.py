"""The Ray head: its command line, its environment, and the remains of an earlier one.

Only ``ray_port`` is fixed, so that two gateways can share a machine. Ray's traffic is authenticated by token and by
certificates on both sides (``blocks/ray_tls.py``).
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import socket
from collections.abc import Mapping

import psutil

from gateway_plugin.blocks.cluster_yaml import cluster_yaml
from gateway_plugin.blocks.job_script import NO_MEMORY_MONITOR, OBJECT_STORE_BYTES, RECONNECT_S
from gateway_plugin.blocks.ray_tls import before_ray_starts, tls_environment
from gateway_plugin.errors import ConfigError, ServiceError
from gateway_plugin.paths import Layout, write_private
from gateway_plugin.processes import Mark, end, folder_processes
from gateway_plugin.site import Site
from gateway_plugin.tls import make_ray_authority

_AF_UNIX_MAX = 107
_SESSION_TAIL = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""The longest path that Ray appends to its temporary folder, with the longest PID."""

PENDING_UNWANTED_S = 30
"""How long a pending block is kept after its demand has ended."""


def head_address(site: Site) -> str:
    """The IP address of this machine that blocks can reach.

    (0) The site names the interface; (1) the site sets the address (a name is resolved). (2) The interface of the
    default route (no packet is sent). (3) Without a route: an interface that is up and not loopback. (4) None:
    127.0.0.1, for blocks on this machine.

    Raises:
        ConfigError: the site's name or interface has no address.
    """
    if site.head_interface:  # (0)
        return _address_of(site)
    if site.head_address != "auto":  # (1)
        try:
            return socket.gethostbyname(site.head_address)
        except OSError as error:
            raise ConfigError(
                f"site {site.name}: head_address: {site.head_address!r} has no address: {error}"
            ) from None
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # (2)
        probe.connect(("198.51.100.1", 9))  # an address reserved for documentation: only the default route leads there
        return str(probe.getsockname()[0])
    states = psutil.net_if_stats()
    for name, addresses in sorted(psutil.net_if_addrs().items()):  # (3)
        for address in addresses:
            up = name in states and states[name].isup
            if up and address.family is socket.AF_INET and not address.address.startswith("127."):
                return str(address.address)
    return "127.0.0.1"  # (4)


def _address_of(site: Site) -> str:
    found = psutil.net_if_addrs()
    for address in found.get(site.head_interface, ()):
        if address.family is socket.AF_INET:
            return str(address.address)
    raise ConfigError(
        f"site {site.name}: head_interface: {site.head_interface!r} has no IPv4 address on this machine; "
        f"it has {', '.join(sorted(found))}"
    )


def head_argv(layout: Layout, site: Site, head_ip: str, python: str) -> tuple[str, ...]:
    """``ray start --head --block``; it stays in the foreground, and exits when a part of the head dies.

    Args:
        python: the interpreter with Ray in it (``sys.executable``).

    Raises:
        ServiceError: the run folder's path is too long for Ray's sockets.
    """
    room = _AF_UNIX_MAX - _SESSION_TAIL
    if len(str(layout.ray_temp)) > room:
        raise ServiceError(
            f"{layout.ray_temp} is too long for Ray's sockets ({room} characters at most): set GATEWAY_RUN_ROOT to a "
            "shorter folder on a local disk."
        )
    return (
        *(python, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        f"--port={site.ray_port}",
        f"--node-ip-address={head_ip}",
        f"--temp-dir={layout.ray_temp}",
        f"--autoscaling-config={layout.cluster_yaml}",
        "--num-cpus=0",  # no part of a model runs on the head
        "--num-gpus=0",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--include-dashboard=false",
        "--dashboard-host=127.0.0.1",
        "--dashboard-agent-listen-port=0",
        "--min-worker-port=0",  # from the system, not Ray's 10002 to 19999, which every Ray of a machine would share
        "--max-worker-port=0",
        "--include-log-monitor=false",
        "--disable-usage-stats",
    )


def head_env(layout: Layout, site: Site, base_env: Mapping[str, str]) -> dict[str, str]:
    """The head's environment: ``base_env`` with all Ray settings replaced by the gateway's.

    A driver needs only ``driver_env``.
    """
    return {
        **driver_env(layout, base_env),
        "RAY_CLOUD_INSTANCE_ID": "head",
        "RAY_NODE_TYPE_NAME": "head",
        # Three replicas that hardly ever change: Serve's ten looks a second take 3 % of a core of a login node.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_START_HOOK": f"{before_ray_starts.__module__}.{before_ray_starts.__name__}",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_gcs_storage": "rocksdb",
        "RAY_gcs_storage_path": str(layout.ray_tables),
        "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S": str(round(site.queue_wait_max_s)),
        "RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S": str(PENDING_UNWANTED_S),
        "AUTOSCALER_UPDATE_INTERVAL_S": "2",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # there is no other head to drain to
        # Metrics without authentication, on every interface. Ray has no switch for these two: it continues without them
        # if they cannot listen, and -1 is no port.
        "AUTOSCALER_METRIC_PORT": "-1",
        "DASHBOARD_METRIC_PORT": "-1",
        "RAY_enable_metrics_collection": "0",
        **NO_MEMORY_MONITOR,
    }


def driver_env(layout: Layout, base_env: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process to join this gateway's Ray, without settings that lead to another."""
    return {
        **{key: value for key, value in base_env.items() if not key.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(layout.ray_token),
        **tls_environment(layout.ray_identity),
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_S),
        "RAY_USAGE_STATS_ENABLED": "0",
        "GATEWAY_STATE": str(layout.state),
    }


def make_secrets(layout: Layout, keep: bool) -> None:
    """Create Ray's token and the authority of its traffic. ``keep``: only what is missing, since live parts use the
    existing ones."""
    if not (keep and layout.ray_token.exists() and layout.ray_token.stat().st_size > 0):
        write_private(layout.ray_token, secrets.token_hex(32))
    make_ray_authority(layout, keep)


def prepare(layout: Layout, site: Site, site_reference: str, head_ip: str) -> None:
    """Write the head's input: secrets (existing ones are kept: blocks have them) and the autoscaler's file."""
    make_secrets(layout, keep=True)
    document = cluster_yaml(site, site_reference, layout, f"{head_ip}:{site.ray_port}")
    write_private(layout.cluster_yaml, json.dumps(document, indent=1))  # JSON is YAML
    clear_leftovers(layout)


def clear_leftovers(layout: Layout) -> None:
    """Before the head starts: remove the address file of an earlier head.

    ``ray start`` trusts it if some process's command line contains the address in it, and a block's does.
    """
    (layout.ray_temp / "ray_current_cluster").unlink(missing_ok=True)


def leftover_processes(layout: Layout) -> tuple[Mark, ...]:
    """Processes of this gateway's earlier head: every process of this user that uses the head's temporary folder.

    Excludes this process, its ancestors, and blocks, which have folders of their own. Includes a driver that is still
    connected to that head.
    """
    return folder_processes(layout.ray_temp)


def end_leftovers(layout: Layout, grace_s: float = 0.0) -> tuple[Mark, ...]:
    """End all leftover processes. Returns those that could not be ended: normally none."""
    return end(lambda: leftover_processes(layout), grace_s)


def forget(layout: Layout) -> None:
    """After ``down``, when head and blocks are gone: remove Ray's tables, its temporary folder and its logs.

    A head with the old tables would expect actors and applications whose blocks are gone.
    """
    shutil.rmtree(layout.ray_tables, ignore_errors=True)
    shutil.rmtree(layout.ray_temp, ignore_errors=True)
