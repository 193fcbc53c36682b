"""The text of a block's job: start Ray, watch it, and leave nothing behind. Pure.

Rules that go with it: the script carries the paths of secrets, never a secret; every value is quoted; it does not trust
the environment that it was submitted from; when Ray is gone it leaves at once, because ``ray start --block`` does not
(an allocation would be held to its walltime).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from gateway_plugin.layout import Layout
from gateway_plugin.site import NodeType

OBJECT_STORE_BYTES = 80_000_000
"""Nothing large goes through Ray's object store here; Ray's smallest is 75 MiB."""

RECONNECT_S = 600
"""How long blocks wait for a head that went away before they give up."""

TOLD_TO_END = 143
"""Exit code of a block that was told to end, as the shell has it for SIGTERM."""

RAY_STOP_GRACE_S = 10
"""How long Ray has to end in a block before it is killed."""


def block_resource(node_type: str) -> str:
    """The Ray resource that a node agent of this type asks for; every block has exactly one: ``gateway_TYPE``."""
    return f"gateway_{node_type}"


def block_folder(run: Path, name: str) -> Path:
    """Ray's temporary folder of block ``name``: short, because sockets lie deep in it (AF_UNIX: 107 characters)."""
    return run / f"b-{name.rsplit('-', 1)[-1]}"


def block_log(layout: Layout, name: str) -> Path:
    """What a block's script and ``ray start`` said."""
    return layout.logs / f"block-{name}.log"


def block_script(
    name: str,
    node_type: NodeType,
    layout: Layout,
    head_address: str,
    python: str = "python",
    bin_folder: str | None = None,
) -> str:
    """The job of block ``name``, a bash script.

    Args:
        name: the block's name, which is Ray's instance id.
        node_type: what the node holds, and the site's own ``worker_init`` lines.
        head_address: ``IP:port`` of the Ray head.
        python: the interpreter with Ray and this package, as seen after ``worker_init``.
        bin_folder: put first on PATH; for blocks on the gateway's own machine, which share its virtual environment.
    """
    environment: dict[str, str] = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(layout.ray_token),
        "RAY_CLOUD_INSTANCE_ID": name,
        "RAY_NODE_TYPE_NAME": node_type.name,
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_S),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A block that is told to end was drained by the controller, or has no time; Ray would wait 30 s more.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "GATEWAY_STATE": str(layout.state),
        "GATEWAY_RUN_ROOT": str(layout.run.parent),
    }
    values: dict[str, str] = {
        "FOLDER": str(block_folder(layout.run, name)),
        "RUN": str(layout.run),
        "RECORDS": str(layout.engine_records),
        "NAME": name,
        "HEAD": head_address,
        "PYTHON": python,
        "LOG": str(block_log(layout, name)),
    }
    resources = json.dumps({block_resource(node_type.name): 1})
    address = _FIND_ADDRESS if node_type.node_address == "auto" else f"ADDRESS=$({node_type.node_address})"
    start = [
        *('"$PYTHON"', "-m", "ray.scripts.scripts", "start", "--block"),
        *('--address="$HEAD"', '--node-ip-address="$ADDRESS"', '--temp-dir="$FOLDER"'),
        *(f"--num-cpus={node_type.cpus}", f"--num-gpus={node_type.gpus}", f"--resources={shlex.quote(resources)}"),
        # Ports are the system's to give: two Rays on one machine must not share a range.
        *(f"--object-store-memory={OBJECT_STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0"),
        *("--dashboard-agent-listen-port=0", "--include-log-monitor=false", "--disable-usage-stats"),
    ]
    return _SCRIPT.format(
        values=_assignments(values, export=False),
        environment=_assignments(environment, export=True),
        path="" if bin_folder is None else f"export PATH={shlex.quote(bin_folder)}:$PATH",
        worker_init=node_type.worker_init,
        address=address,
        start=" ".join(start),
        told=TOLD_TO_END,
        stop_tenths=RAY_STOP_GRACE_S * 10,
    )


def _assignments(values: Mapping[str, str], export: bool) -> str:
    prefix = "export " if export else ""
    return "\n".join(f"{prefix}{key}={shlex.quote(value)}" for key, value in values.items())


_FIND_ADDRESS = """\
ADDRESS=$("$PYTHON" -c 'import socket, sys
probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
probe.connect((sys.argv[1].rsplit(":", 1)[0], 9))
print(probe.getsockname()[0])' "$HEAD")"""

# In this text every brace that is not a placeholder is doubled.
_SCRIPT = """\
umask 077
{values}
exec >>"$LOG" 2>&1
# What the submitting process had of Ray's settings (it is part of the head) must not reach this node.
unset ${{!RAY_@}}
{path}
{worker_init}
{environment}
RAY=
LEAVING=
leave() {{
  [ -n "$LEAVING" ] && return
  LEAVING=1
  trap '' TERM INT HUP USR2
  echo "$(date +%FT%T%z) leaving: $1"
  if [ -n "$RAY" ]; then
    kill "$RAY" 2>/dev/null
    for ((i = 0; i < {stop_tenths}; i++)); do running && sleep 0.1 || break; done
    running && kill -KILL "$RAY" 2>/dev/null
  fi
  "$PYTHON" -m gateway_plugin.blocks.leave --records "$RECORDS" --block "$NAME" --folder "$FOLDER"
  rm -rf -- "$FOLDER"
}}
running() {{  # ray start is there, and not only as a zombie
  local pid name state rest
  read -r pid name state rest 2>/dev/null <"/proc/$RAY/stat" && [ "$state" != Z ]
}}
raylet() {{  # Ray's own process for this node is there: a child of ray start
  local child pid name state rest
  for child in $(cat /proc/"$RAY"/task/*/children 2>/dev/null); do
    read -r pid name state rest 2>/dev/null <"/proc/$child/stat" || continue
    [ "$name" = "(raylet)" ] && [ "$state" != Z ] && return 0
  done
  return 1
}}
trap 'leave "told to"; exit {told}' TERM INT HUP
echo "$(date +%FT%T%z) block $NAME on $(uname -n), head $HEAD"
mkdir -p -m 700 "$RUN" "$RECORDS" "$FOLDER" && [ -O "$RUN" ] || {{ echo "$RUN is not ours"; exit 73; }}
{address}
for attempt in 1 2; do  # Ray's node gives up where its helpers take 15 s to import, as they may the first time
  rm -f "$FOLDER/ray_current_cluster"
  {start} &
  RAY=$!
  seen=
  while running; do
    if raylet; then
      seen=1
    elif [ -e "$FOLDER/ray_current_cluster" ]; then
      # Drained: ray start stays, and would for ever. Crashed: it notices within a second, and ends.
      for ((i = 0; i < 20; i++)); do running && sleep 0.1 || break; done
      running && {{ leave "Ray gave this node back"; exit 0; }}
      break
    elif [ -n "$seen" ]; then
      kill "$RAY" 2>/dev/null  # it would wait on, for a node that is gone
      break
    fi
    sleep 0.5 & wait $!
  done
  wait "$RAY"; code=$?
  [ -e "$FOLDER/ray_current_cluster" ] && break
  echo "$(date +%FT%T%z) Ray did not start, exit code $code"
done
leave "ray start ended with exit code $code"
exit "$((code ? code : 1))"
"""
