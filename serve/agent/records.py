"""What a node remembers of its engines, on its own disk, so that whoever comes next adopts or ends them.

One JSON file an engine, 0600, in the node's 0700 run folder. It holds the engine's key: an agent made anew must ask an
engine one real request before it says that it is ready, and the slot may have another key by then.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from gateway_plugin.errors import GatewayError
from gateway_plugin.identity import Mark, has_its_pid, mark
from gateway_plugin.layout import Layout, private_folder, write_private

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineRecord:
    """One engine process: enough to find it again, to know that it is the same one, and to ask it."""

    engine: str
    model: str
    task: str
    node: str
    block: str
    pid: int
    """Leader of its own session and process group."""
    started: float
    """With ``ticks`` and ``boot`` as in ``Mark``: a process with this PID and another start is a stranger."""
    host: str
    port: int
    epoch: int
    generation: int
    gpus: tuple[int, ...]
    memory_mib: int
    log: str
    key: str = dataclasses.field(repr=False)
    secrets: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    """Values of its environment that are not to be shown."""
    ready: bool = False
    loaded_s: float | None = None
    ticks: int = 0
    boot: str = ""
    hang_after_s: float = 300.0
    """``Model.hang_after_s`` when it was started."""

    @property
    def mark(self) -> Mark:
        """Its process."""
        return Mark(self.pid, self.started, self.ticks, self.boot)

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"{self.host}:{self.port}"


def record_path(layout: Layout, engine: str) -> Path:
    """The file of ``engine``'s record."""
    return layout.engine_records / f"{file_name(engine)}.json"


def file_name(engine: str) -> str:
    """``engine`` as a file's name: what is no letter, digit, ``.``, ``-`` or ``_`` becomes ``_``."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", engine)


def write(layout: Layout, record: EngineRecord) -> None:
    """Write or replace a record, atomically, 0600."""
    private_folder(layout.engine_records)
    write_private(record_path(layout, record.engine), json.dumps(dataclasses.asdict(record)))


def remove(layout: Layout, engine: str) -> None:
    """Forget an engine that is gone."""
    record_path(layout, engine).unlink(missing_ok=True)


def read_all(layout: Layout) -> Iterator[EngineRecord]:
    """Every record on this node. A file that is no record is removed: it can be nobody's engine."""
    for path in sorted(layout.engine_records.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            tuples = {"gpus": tuple(document["gpus"]), "secrets": tuple(document.get("secrets", ()))}
            yield EngineRecord(**{**document, **tuples})
        except FileNotFoundError:
            continue  # another block's agent removed it meanwhile
        except (ValueError, TypeError, KeyError):
            path.unlink(missing_ok=True)


def completed(layout: Layout, record: EngineRecord) -> EngineRecord:
    """The record of an engine that runs; one that an earlier version wrote becomes one of this version: its process
    could not be known any more, by the wall clock alone, once that is set."""
    found = mark(record.pid)
    if record.boot or found is None:
        return record
    record = dataclasses.replace(record, ticks=found.ticks, boot=found.boot)
    try:
        write(layout, record)
    except (GatewayError, OSError) as error:  # the engine is adopted all the same
        logger.warning("record not completed engine=%s why=%s", record.engine, error)
    return record


def group_members(leader: Mark) -> tuple[int, ...]:
    """Living processes of the session and process group that ``leader`` leads or led, itself included.

    The kernel gives a PID to nobody else while a session of that number has members; so where another process has the
    PID, nothing is left of the group. Where none has it, the leader is gone, and others may not be.
    """
    if has_its_pid(leader) is False:
        return ()
    return tuple(other for other in psutil.pids() if _belongs(other, leader.pid))


def _belongs(pid: int, leader: int) -> bool:
    try:
        if os.getsid(pid) != leader and os.getpgid(pid) != leader:
            return False
        process = psutil.Process(pid)
        # Of a killed process the first thread may be a zombie while others still give the device's memory back.
        ended = process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1
        return process.uids().real == os.getuid() and not ended
    except (psutil.NoSuchProcess, ProcessLookupError, PermissionError):
        return False  # gone meanwhile, or somebody else's
