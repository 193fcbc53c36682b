"""What a node remembers of its engines, on its own disk, so that whoever comes next adopts or ends them.

One JSON file an engine, 0600, in the node's 0700 run folder. It holds the engine's key: an agent made anew must ask an
engine one real request before it says that it is ready, and the slot may have another key by then.
"""

from __future__ import annotations

import contextlib
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
from gateway_plugin.paths import Layout, private_folder, write_private
from gateway_plugin.processes import Mark, has_its_pid, mark
from gateway_plugin.state_file import read_object

logger = logging.getLogger(__name__)

_BLOCK_MARK = "RAY_CLOUD_INSTANCE_ID"
"""In the environment of all that runs in a block: the block's name."""
_KILLED_WITHIN_S = 10.0


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
    """Every record on this node that can be understood; keys of a later version are passed over."""
    for path in sorted(layout.engine_records.glob("*.json")):
        record = _read(path)
        if record is not None:
            yield record


def garbled(layout: Layout) -> tuple[Path, ...]:
    """Files that are no records, though an engine may run that they were of."""
    return tuple(p for p in sorted(layout.engine_records.glob("*.json")) if _read(p) is None and p.exists())


def end_unrecorded(layout: Layout, block: str) -> None:
    """Kill the engines of ``block`` whose records are garbled, and remove those. Blocks.

    An engine is known by its log, which has the record's name. Nobody could ask it anything: its key is lost.
    """
    for path in garbled(layout):
        living = _writers(layout.engine_logs / f"{path.stem}.log")
        if living and not any(_is_of(process, block) for process in living):
            continue  # another block's, on the same machine
        logger.warning("engine record garbled path=%s ended=%s", path, [process.pid for process in living])
        for process in living:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(living, timeout=_KILLED_WITHIN_S)
        path.unlink(missing_ok=True)


def _writers(log: Path) -> list[psutil.Process]:
    """This user's processes whose standard output or error is ``log``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):  # it ended meanwhile, or is closed to us
            files = (f"/proc/{process.pid}/fd/{number}" for number in (1, 2))
            if process.uids().real == os.getuid() and any(os.path.samefile(file, log) for file in files):
                found.append(process)
    return found


def _is_of(process: psutil.Process, block: str) -> bool:
    try:
        return process.environ().get(_BLOCK_MARK, "") == block
    except (OSError, psutil.Error):
        return False


def _read(path: Path) -> EngineRecord | None:
    """``None`` if it is garbled, or gone: another block's agent may have removed it meanwhile."""
    known = {field.name for field in dataclasses.fields(EngineRecord)}
    try:
        document = {key: value for key, value in (read_object(path) or {}).items() if key in known}
        tuples = {"gpus": tuple(document["gpus"]), "secrets": tuple(document.get("secrets", ()))}
        record = EngineRecord(**{**document, **tuples})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if isinstance(record.pid, int) and isinstance(record.started, int | float) else None


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
