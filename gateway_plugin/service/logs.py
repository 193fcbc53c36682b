"""The gateway's logs: which there are, their last lines, and following them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from gateway_plugin.blocks.jobs import script_place
from gateway_plugin.errors import NotFound
from gateway_plugin.layout import Layout

_TAIL_BYTES = 256 * 1024


def find_logs(layout: Layout) -> dict[str, Path]:
    """Name -> file of every log that exists: the parts, ``engine:NAME``, ``block:NAME``, Serve's, Ray's own.

    ``serve:NAME`` is what Ray Serve says of its processes; of several replicas' logs the newest.
    """
    candidates: dict[str, Path] = {
        "supervisor": layout.supervisor_log,
        "edge": layout.edge_log,
        "usage": layout.usage_log,
        "controller": layout.logs / "controller.log",
        "ingress": layout.logs / "ingress.log",
        "ray": layout.head_log,
        "deploy": layout.deploy_log,
    }
    for path in sorted(layout.engine_logs.glob("*.log")):
        candidates[f"engine:{path.stem}"] = path
    for path in sorted(layout.logs.glob("block-*.log")):
        candidates[f"block:{path.stem.removeprefix('block-')}"] = path
    scripts = script_place(layout)
    for path in (*sorted(scripts.glob("*.stdout")), *sorted(scripts.glob("*.stderr"))):
        candidates[f"job:{path.name}"] = path
    session = layout.ray_temp / "session_latest" / "logs"
    by_time = sorted(session.glob("serve/*.log"), key=lambda path: path.stat().st_mtime)  # a later replica replaces
    for path in by_time:
        words = path.stem.split("_")
        replica = words[0] == "replica" and len(words) >= 3  # replica_gateway_controller_ID.log
        candidates[f"serve:{'replica-' + words[2] if replica else words[0]}"] = path
    for name in ("gcs_server.out", "raylet.out", "monitor.log", "autoscaler.log"):
        candidates[f"ray:{name.partition('.')[0]}"] = session / name
    return {name: path for name, path in candidates.items() if path.is_file()}


def log_named(layout: Layout, name: str) -> Path:
    """The log called ``name``; ``engine:NAME`` finds the latest engine whose log begins so. Raises ``NotFound``."""
    logs = find_logs(layout)
    if name in logs:
        return logs[name]
    similar = [path for known, path in logs.items() if known.startswith(name)]
    if similar:
        return max(similar, key=lambda path: path.stat().st_mtime)
    known = ", ".join(logs) or "none yet"
    raise NotFound(f"There is no log called '{name}' in {layout.logs}. There are: {known}.")


def last_lines(path: Path, count: int) -> list[str]:
    """The last ``count`` lines of a file (of its last 256 KiB); empty if there is none."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - _TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    return text.splitlines()[-count:] if count > 0 else []


def follow(path: Path, poll_s: float = 0.2) -> Iterator[str]:
    """Lines that are added to ``path`` from now on, for ever; a file that is replaced is opened anew."""
    stream = path.open("r", encoding="utf-8", errors="replace")
    stream.seek(0, 2)
    inode = path.stat().st_ino
    while True:
        line = stream.readline()
        if line:
            yield line.rstrip("\n")
            continue
        time.sleep(poll_s)
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        if found.st_ino != inode or found.st_size < stream.tell():
            stream.close()
            stream = path.open("r", encoding="utf-8", errors="replace")
            inode = found.st_ino
