"""The text of a block's job: start Ray, watch it, and leave nothing behind. Pure.

Rules that go with it: the script carries the paths of secrets, never a secret; every value is quoted; it does not trust
the environment that it was submitted from; when Ray is gone it leaves at once, because ``ray start --block`` does not
(an allocation would be held to its walltime).

It leaves (1) when Ray gave the node back; (2) when the gateway told it to, or says that its job is over: a mark with
its name lies in the state folder; (3) ``leave_before_end_s`` before its walltime ends; (4) told to end by somebody
else, once no engine is left on it, at the latest ``notice_s`` later: meanwhile a notice lies in its folder for the
agent.

What ``scancel``, a preemption and the walltime do to it, seen on Slurm 22.05 (``tests/slurm/test_leaving.py``): SIGCONT
and SIGTERM come together, SIGKILL follows after the site's ``KillWait``, whatever signal ``scancel`` was given. Of a
partition's ``GraceTime`` a batch shell hears nothing: it is over when SIGTERM comes (a job with ``--signal=B:USR1@60``
is told, where the cluster has ``PreemptParameters=send_user_signal``). Under ``proctrack/cgroup``, Slurm's default,
SIGTERM reaches the batch shell alone and SIGKILL all that the job started. ``proctrack/pgid`` tells the shell's process
group: so Ray runs in a session of its own. ``proctrack/linuxproc`` tells every process at once, engines too: there is
nothing left to drain.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway_plugin.blocks.ray_tls import before_ray_starts, tls_environment
from gateway_plugin.paths import Layout, block_folder, block_log
from gateway_plugin.site import NodeType

OBJECT_STORE_BYTES = 80_000_000
"""Nothing large goes through Ray's object store here; Ray's smallest is 75 MiB."""

RECONNECT_S = 600
"""How long blocks wait for a head that went away before they give up."""

NO_MEMORY_MONITOR = {"RAY_memory_monitor_refresh_ms": "0"}
"""Ray's monitor kills its own workers where a node's memory is nearly full, whoever fills it: on a shared node the
controller, or an agent and with it every engine of the node. Neither is large, and the kernel sees to who is."""

TOLD_TO_END = 143
"""Exit code of a block that was told to end, as the shell has it for SIGTERM."""

RAY_STOP_GRACE_S = 10
"""How long Ray has to end in a block before it is killed."""


@dataclass(frozen=True)
class Leaving:
    """When a block leaves. All in seconds."""

    walltime_s: int | None = None
    """Of its job, counted from the script's start unless Slurm knows better; ``None``: it has none."""
    before_end_s: float = 30.0
    """``Site.leave_before_end_s``"""
    notice_s: float = 20.0
    """``Site.notice_s``"""
    look_every_s: int = 10
    """It looks for its mark so often: one look at a folder of the shared file system."""
    ask_every_s: int = 300
    """It asks Slurm so often when its job ends, or half as much again, at random. A thousand blocks ask three times a
    second in all, each for one job, which is the cheapest question there is."""


def block_resource(node_type: str) -> str:
    """The Ray resource that a node agent of this type asks for; every block has exactly one: ``gateway_TYPE``."""
    return f"gateway_{node_type}"


def block_script(
    name: str,
    node_type: NodeType,
    layout: Layout,
    head_address: str,
    python: str = "python",
    bin_folder: str | None = None,
    leaving: Leaving = Leaving(),
) -> str:
    """The job of block ``name``, a bash script.

    Args:
        name: the block's name, which is Ray's instance id.
        node_type: what the node holds, and the site's own ``worker_init`` lines.
        head_address: ``IP:port`` of the Ray head.
        python: the interpreter with Ray and this package, as seen after ``worker_init``.
        bin_folder: put first on PATH; for blocks on the gateway's own machine, which share its virtual environment.
        leaving: when it leaves by itself.
    """
    environment: dict[str, str] = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(layout.ray_token),
        "RAY_START_HOOK": f"{before_ray_starts.__module__}.{before_ray_starts.__name__}",
        "RAY_enable_metrics_collection": "0",
        "RAY_CLOUD_INSTANCE_ID": name,
        "RAY_NODE_TYPE_NAME": node_type.name,
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_S),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A block that is told to end was drained by the controller, or has no time; Ray would wait 30 s more.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        **NO_MEMORY_MONITOR,
        "GATEWAY_STATE": str(layout.state),
        "GATEWAY_RUN_ROOT": str(layout.run.parent),
    }
    values: dict[str, str] = {
        "NAME": name,
        "HEAD": head_address,
        "PYTHON": python,
        "LOG": str(block_log(layout, name)),
        "MARKS": str(layout.leave_marks),
        "WALLTIME_S": "" if leaving.walltime_s is None else str(leaving.walltime_s),
        "BEFORE_END_S": str(math.ceil(leaving.before_end_s)),
        "NOTICE_S": str(math.ceil(leaving.notice_s)),
        "LOOK_EVERY_S": str(leaving.look_every_s),
        "ASK_EVERY_S": str(leaving.ask_every_s),
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
        records=layout.engine_records.name,
        folder=block_folder(Path(), name),
        tls="\n".join(f"export {key}={value}" for key, value in tls_environment(Path("$FOLDER/tls")).items()),
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
ulimit -c 0  # core files hold prompts and keys
{values}
exec >>"$LOG" 2>&1
# What the submitting process had of Ray's settings (it is part of the head) must not reach this node.
unset ${{!RAY_@}} ${{!SQUEUE_@}}
{path}
{worker_init}
{environment}
# Which GPUs are this block's is for its engines to know. Ray would refuse to start where there are fewer than the node
# type says, and hides them from an actor that asks for none.
export GATEWAY_VISIBLE_DEVICES=${{CUDA_VISIBLE_DEVICES:-${{ROCR_VISIBLE_DEVICES:-${{HIP_VISIBLE_DEVICES:-}}}}}}
unset CUDA_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES HIP_VISIBLE_DEVICES
# Ray changes these for its workers, and an engine is none (serve/agent/argv.py).
export GATEWAY_KEPT_OMP_NUM_THREADS=${{OMP_NUM_THREADS-}} GATEWAY_KEPT_LD_PRELOAD=${{LD_PRELOAD-}}
RAY=
UNTIL=   # told to end by somebody else: when it leaves at the latest
CODE={told}
clock() {{  # NOW counts the machine's seconds since its boot, WALL is the clock that people set
  read -r NOW _ </proc/uptime
  NOW=${{NOW%.*}}
  printf -v WALL '%(%s)T' -1
}}
ends() {{  # Slurm's word for its end, by the wall clock, is taken as so long from now
  SAID=$1 ENDS=$((NOW + $1 - WALL))
}}
clock
ENDS=${{WALLTIME_S:+$((NOW + WALLTIME_S))}}
SAID=
[ -n "$ENDS" ] && [ -n "$SLURM_JOB_END_TIME" ] && ends "$SLURM_JOB_END_TIME"
LOOK_AT=$NOW
ASK_AT=$((NOW + RANDOM % (1 + ASK_EVERY_S / 10)))
leave() {{
  trap '' TERM INT HUP USR1 USR2
  echo "$(date +%FT%T%z) leaving: $1"
  if [ -n "$RAY" ]; then
    kill "$RAY" 2>/dev/null
    for ((i = 0; i < {stop_tenths}; i++)); do running && sleep 0.1 || break; done
    running && kill -KILL "$RAY" 2>/dev/null
  fi
  "$PYTHON" -m gateway_plugin.blocks.cleanup --records "$RECORDS" --block "$NAME" --folder "$FOLDER"
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
marked() {{  # opening the folder makes a client of NFS ask its server again
  true 2>/dev/null <"$MARKS"
  [ -e "$MARKS/$NAME" ]
}}
engines() {{  # one of this block's is recorded
  grep -qsF '"block": "'"$NAME"'"' "$RECORDS"/*.json
}}
told() {{
  if marked || [ -z "$RAY" ]; then
    leave "told to"
    exit {told}
  fi
  notice "cancelled or preempted by others than the gateway" {told}
}}
notice() {{  # its agent tells the controller, which has this long to drain its engines
  [ -n "$UNTIL" ] && return
  clock
  UNTIL=$((NOW + NOTICE_S)) CODE=$2
  echo "$(date +%FT%T%z) $1: leaving within $NOTICE_S s"
  printf '{{"until": %d, "reason": "%s"}}\n' "$((WALL + NOTICE_S))" "$1" >"$FOLDER/.notice"
  mv -f "$FOLDER/.notice" "$FOLDER/notice"
  look
}}
ask() {{  # in the background: a controller that is away must not keep us from hearing a signal
  local last
  ASK_AT=$((NOW + ASK_EVERY_S + RANDOM % (1 + ASK_EVERY_S / 2)))
  last=$((ENDS - BEFORE_END_S - 60))  # its walltime may have been changed since
  [ "$last" -gt $((NOW + 60)) ] && [ "$last" -lt "$ASK_AT" ] && ASK_AT=$last
  (SLURM_TIME_FORMAT=%s LC_ALL=C squeue -h --all -t all -j "$SLURM_JOB_ID" -o '%T %e' >"$FOLDER/.job" 2>/dev/null &&
    mv -f "$FOLDER/.job" "$FOLDER/job") &
}}
answered() {{
  local state= ends=
  read -r state ends <"$FOLDER/job"
  rm -f "$FOLDER/job"
  case $state in
    COMPLETED | CANCELLED | FAILED | TIMEOUT | NODE_FAIL | PREEMPTED | DEADLINE | BOOT_FAIL | OUT_OF_MEMORY | REVOKED)
      leave "Slurm calls its job $state"  # slurmd died, and nobody ended what it had started
      exit {told} ;;
  esac
  case $ends in
    "" | *[!0-9]* | "$SAID") ;;
    *) ends "$ends"; echo "$(date +%FT%T%z) its walltime ends in $((ENDS - NOW)) s" ;;
  esac
}}
look() {{  # leave, if it is time to
  clock
  if [ -n "$UNTIL" ]; then
    engines || {{ leave "no engine is left"; exit "$CODE"; }}
    [ "$NOW" -ge "$UNTIL" ] && {{ leave "its notice ends"; exit "$CODE"; }}
  fi
  if [ "$NOW" -ge "$LOOK_AT" ]; then
    LOOK_AT=$((NOW + LOOK_EVERY_S))
    marked && {{ leave "told to by its mark"; exit {told}; }}
  fi
  [ -n "$ENDS" ] || return
  [ -e "$FOLDER/job" ] && answered
  [ "$NOW" -ge $((ENDS - BEFORE_END_S)) ] && {{ leave "its walltime ends"; exit 0; }}
  [ -n "$SLURM_JOB_ID" ] && [ "$NOW" -ge "$ASK_AT" ] && ask
}}
RUN=$("$PYTHON" -m gateway_plugin.blocks.run_folder) || exit 73
RECORDS=$RUN/{records} FOLDER=$RUN/{folder}
mkdir -p -m 700 "$RECORDS" "$FOLDER" || exit 73
export GATEWAY_BLOCK_FOLDER=$FOLDER
{tls}
trap told TERM
trap 'notice "signalled ahead of its end" 0' USR1
trap 'leave "told to"; exit {told}' INT HUP
echo "$(date +%FT%T%z) block $NAME on $(uname -n), head $HEAD"
{address}
for attempt in 1 2; do  # Ray's node gives up where its helpers take 15 s to import, as they may the first time
  rm -f "$FOLDER/ray_current_cluster"
  setsid {start} &
  RAY=$!
  seen=
  while running; do
    if raylet; then
      seen=1
    elif [ -e "$FOLDER/ray_current_cluster" ]; then
      # Drained: ray start stays, and would for ever. Crashed: it notices within a second, and ends.
      for ((i = 0; i < 20; i++)); do running && ! raylet && sleep 0.1 || break; done
      raylet && continue
      running && {{ leave "Ray gave this node back"; exit 0; }}
      break
    elif [ -n "$seen" ]; then
      kill "$RAY" 2>/dev/null  # it would wait on, for a node that is gone
      break
    fi
    look
    sleep 0.5 & wait $!
  done
  wait "$RAY"; code=$?
  [ -n "$UNTIL" ] && {{ leave "told to, and so was Ray"; exit "$CODE"; }}
  [ -e "$FOLDER/ray_current_cluster" ] && break
  echo "$(date +%FT%T%z) Ray did not start, exit code $code"
done
leave "ray start ended with exit code $code"
exit "$((code ? code : 1))"
"""
