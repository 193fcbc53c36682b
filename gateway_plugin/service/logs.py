"""The gateway's logs: list them, read their last lines, follow them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path

from gateway_plugin.blocks.ledger import Ledger
from gateway_plugin.errors import NotFound
from gateway_plugin.masking import secrets_of
from gateway_plugin.paths import Layout, block_log
from gateway_plugin.schedulers.base import script_place
from gateway_plugin.service.active_catalog import in_force

_TAIL_BYTES = 256 * 1024
_JOB_OUTPUTS = (".out", ".err", ".stdout", ".stderr")
"""The suffixes of several Parsl providers."""


def find_logs(layout: Layout) -> dict[str, Path]:
    """Name -> file of every log that exists: the parts, ``engine:NAME``, ``block:NAME``, Serve's, Ray's own.

    ``serve:NAME`` is the log of a Ray Serve process; the newest of several replicas.
    """
    candidates: dict[str, Path] = {
        "supervisor": layout.supervisor_log,
        "edge": layout.edge_log,
        "usage": layout.usage_log,
        "controller": layout.controller_log,
        "ingress": layout.ingress_log,
        "desk": layout.desk_log,
        "ray": layout.head_log,
        "deploy": layout.deploy_log,
    }
    candidates |= {f"engine:{path.stem}": path for path in sorted(layout.engine_logs.glob("*.log"))}
    blocks, jobs = sorted(layout.logs.glob("block-*.log")), sorted(script_place(layout).glob("gw-*"))
    candidates |= {f"block:{path.stem.removeprefix('block-')}": path for path in blocks}
    candidates |= {f"job:{path.name}": path for path in jobs if path.suffix in _JOB_OUTPUTS}
    session = layout.ray_temp / "session_latest" / "logs"
    by_time = sorted(session.glob("serve/*.log"), key=lambda path: path.stat().st_mtime)  # a later replica replaces
    for path in by_time:
        words = path.stem.split("_")
        replica = words[0] == "replica" and len(words) >= 3  # replica_gateway_controller_ID.log
        candidates[f"serve:{'replica-' + words[2] if replica else words[0]}"] = path
    of_ray = ("gcs_server.out", "raylet.out", "monitor.log", "autoscaler.log")
    candidates |= {f"ray:{name.partition('.')[0]}": session / name for name in of_ray}
    return {name: path for name, path in candidates.items() if path.is_file()}


def log_named(layout: Layout, name: str) -> Path:
    """The log called ``name``; ``engine:NAME`` finds the latest engine log with that prefix. Raises ``NotFound``."""
    logs = find_logs(layout)
    if name in logs:
        return logs[name]
    similar = [path for known, path in logs.items() if known.startswith(name)]
    if similar:
        return max(similar, key=lambda path: path.stat().st_mtime)
    known = ", ".join(logs) or "none yet"
    raise NotFound(f"There is no log called '{name}' in {layout.logs}. There are: {known}.")


def block_logs(layout: Layout, name: str) -> dict[str, Path]:
    """Label -> file of the output so far of block ``name`` and its job: ``block``, ``job stdout``, ``job stderr``.

    Empty for a pending block. Raises ``NotFound`` for a name that neither a log nor the ledger has.
    """
    found = {"block": log} if (log := block_log(layout, name)).is_file() else {}
    for path in sorted(script_place(layout).glob("gw-*")):
        if path.name.startswith(f"{name}.") and path.suffix in _JOB_OUTPUTS:
            found["job stderr" if path.suffix in (".err", ".stderr") else "job stdout"] = path
    if not found and name not in (known := _blocks_known(layout)):
        names = ", ".join(known) or "none yet"
        raise NotFound(f"There is no block called '{name}' in {layout.state}. There are: {names}.")
    return found


def _blocks_known(layout: Layout) -> list[str]:
    """Names of blocks, those with a log and those in the ledger; the youngest last."""
    asked_at = {block.name: block.asked_at for block in Ledger(layout.ledger).read().values()}
    for path in layout.logs.glob("block-*.log"):
        asked_at.setdefault(path.stem.removeprefix("block-"), path.stat().st_mtime)
    return sorted(asked_at, key=lambda name: (asked_at[name], name))


def secrets_in_force(layout: Layout) -> tuple[str, ...]:
    """Values of the environments in the catalog in force, which engines may have printed; none if it is damaged."""
    catalog = in_force(layout)
    models = catalog.models if catalog is not None else ()
    return tuple(secret for model in models for secret in secrets_of(model.variables))


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
    """Lines added to ``path`` from now on, without end; a replaced file is opened anew."""
    return (line for _, line in follow_all(lambda: {"": path}, poll_s))


def follow_all(files: Callable[[], Mapping[str, Path]], poll_s: float = 0.2) -> Generator[tuple[str, str], None, None]:
    """``(label, line)`` for lines added from now on, without end; a file that ``files`` names later is read whole."""
    followed = {label: _Followed(path, from_end=True) for label, path in files().items()}
    try:
        while True:
            news = [(label, line) for label, one in followed.items() for line in one.new_lines()]
            yield from news
            if news:
                continue
            time.sleep(poll_s)
            for label, path in files().items():
                if label not in followed:
                    followed[label] = _Followed(path, from_end=False)
    finally:
        for one in followed.values():
            one.close()


class _Followed:
    """One file that grows."""

    def __init__(self, path: Path, from_end: bool) -> None:
        self._path = path
        self._open()
        if from_end:
            self._stream.seek(0, 2)

    def _open(self) -> None:
        self._stream = self._path.open("r", encoding="utf-8", errors="replace")
        self._inode = os.fstat(self._stream.fileno()).st_ino

    def new_lines(self) -> Iterator[str]:
        """The lines added since the last call."""
        while line := self._stream.readline():
            yield line.rstrip("\n")
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return  # it may come again
        if found.st_ino != self._inode or found.st_size < self._stream.tell():
            self.close()
            self._open()

    def close(self) -> None:
        self._stream.close()
