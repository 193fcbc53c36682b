"""The text of a block's job: set up the node's environment, and become ``blocks/host.py``. Pure.

Where ``worker_init`` sets a trap on EXIT it stays instead, passes its signals on, and runs the trap after all else.

It carries the paths of secrets, never a secret; every value is quoted; it does not trust the environment that it was
submitted from.
"""

from __future__ import annotations

import json
import shlex

from gateway_plugin.blocks.leaving import CANCELLED, NO_FOLDER, Leaving, Settings
from gateway_plugin.blocks.ray_tls import before_ray_starts
from gateway_plugin.paths import Layout, block_log
from gateway_plugin.site import NodeType

OBJECT_STORE_BYTES = 80_000_000
"""Nothing large goes through Ray's object store here; Ray's smallest is 75 MiB."""

RECONNECT_S = 600
"""How long blocks wait for a head that went away before they give up."""

NO_MEMORY_MONITOR = {"RAY_memory_monitor_refresh_ms": "0"}
"""Ray's monitor kills its own workers where a node's memory is nearly full, also of other users' processes: on a shared
node the controller, or an agent and with it every engine of the node. Neither is large; the kernel chooses better."""


_PATIENT = Leaving()


def block_resource(node_type: str) -> str:
    """The Ray resource that a node agent of this type asks for; every block has exactly one: ``gateway_TYPE``."""
    return f"gateway_{node_type}"


def block_settings(
    name: str, node_type: NodeType, layout: Layout, head_address: str, python: str, leaving: Leaving, report: str = ""
) -> Settings:
    """Settings of the program in the job of block ``name``. See ``block_script``."""
    return Settings(
        name=name,
        head=head_address,
        state=str(layout.state),
        run_root=str(layout.run.parent),
        python=python,
        ray=(
            *(f"--num-cpus={node_type.cpus}", f"--num-gpus={node_type.gpus}"),
            f"--resources={json.dumps({block_resource(node_type.name): 1})}",
            # Ports are the system's to give: two Rays on one machine must not share a range.
            *(f"--object-store-memory={OBJECT_STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0"),
            *("--dashboard-agent-listen-port=0", "--include-log-monitor=false", "--disable-usage-stats"),
        ),
        environment={
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(layout.ray_token),
            "RAY_START_HOOK": f"{before_ray_starts.__module__}.{before_ray_starts.__name__}",
            "RAY_enable_metrics_collection": "0",
            "RAY_CLOUD_INSTANCE_ID": name,
            "RAY_NODE_TYPE_NAME": node_type.name,
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_S),
            "RAY_USAGE_STATS_ENABLED": "0",
            # A block that is cancelled was drained by the controller, or has no time; Ray would wait 30 s more.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            **NO_MEMORY_MONITOR,
        },
        leaving=leaving,
        report=report,
    )


def block_script(
    name: str,
    node_type: NodeType,
    layout: Layout,
    head_address: str,
    python: str = "python",
    bin_folder: str | None = None,
    leaving: Leaving = _PATIENT,
    report: str = "",
) -> str:
    """The job of block ``name``, a bash script.

    Args:
        name: the block's name, which is Ray's instance id.
        node_type: what the node holds, and the site's own ``worker_init`` lines.
        head_address: ``IP:port`` of the Ray head.
        python: the interpreter with Ray and this package, as seen after ``worker_init``.
        bin_folder: put first on PATH; for blocks on the gateway's own machine, which share its virtual environment.
        leaving: when it leaves by itself.
        report: start no Ray, but look at the node and write what is found to this file.
    """
    settings = block_settings(name, node_type, layout, head_address, python, leaving, report)
    return _SCRIPT.format(
        values=f"NAME={shlex.quote(name)} HEAD={shlex.quote(head_address)} PYTHON={shlex.quote(python)}",
        log=shlex.quote(str(block_log(layout, name))),
        path="" if bin_folder is None else f"export PATH={shlex.quote(bin_folder)}:$PATH",
        worker_init=node_type.worker_init,
        address=_address(node_type),
        python=shlex.quote(python),
        settings=shlex.quote(settings.text()),
        cancelled=CANCELLED,
    )


def _address(node_type: NodeType) -> str:
    """Sets ``ADDRESS``; empty: the program finds it. An expression that fails must not look like ``auto``."""
    if node_type.node_address == "auto":
        return "ADDRESS="
    failed = f"node_address= of node type {node_type.name} printed nothing on this node: {node_type.node_address}"
    return f"""\
ADDRESS=$({node_type.node_address}) || :
[ -n "$ADDRESS" ] || {{ echo {shlex.quote(failed)} >&2; exit {NO_FOLDER}; }}"""


_SCRIPT = """\
umask 077
ulimit -c 0  # core files hold prompts and keys
{values}
exec >>{log} 2>&1
# What the submitting process had of Ray's settings (it is part of the head) must not reach this node.
unset ${{!RAY_@}} ${{!SQUEUE_@}}
{path}
{worker_init}
{address}
set -- {python} -m gateway_plugin.blocks.host {settings} "$ADDRESS" $$ "$0"
[ -n "$(trap -p EXIT)" ] || exec "$@"
# worker_init wants to do something at the end (remove scratch files, stop a daemon), which exec would drop.
HOST=
pass() {{ [ -n "$HOST" ] || exit {cancelled}; kill -"$1" "$HOST" 2>/dev/null || :; }}
trap 'pass TERM' TERM; trap 'pass USR1' USR1; trap 'pass HUP' INT HUP  # what runs with & ignores SIGINT
"$@" & HOST=$!
while kill -0 "$HOST" 2>/dev/null; do wait "$HOST" || :; done
wait "$HOST"
"""
