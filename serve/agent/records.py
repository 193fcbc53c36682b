"""Engine records on the node's own disk, by which the next agent adopts or ends the engines.

One JSON file an engine, 0600, in the node's 0700 run folder. It holds the engine's key: a new agent must send an
engine one real request before it reports it ready, and the slot may have another key by then.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from gateway_plugin.engine_records import engine_folder, strays
from gateway_plugin.errors import GatewayError
from gateway_plugin.paths import Layout, private_folder
from gateway_plugin.processes import Mark, carries_mark, end, mark, mark_of_dead, own_pids, writes_to
from gateway_plugin.state_file import State, StateFile

logger = logging.getLogger(__name__)


class EngineRecord(State):
    """One engine process: enough to find, identify and query it."""

    engine: str
    model: str
    task: str
    node: str
    block: str
    pid: int
    """Leader of its own session and process group."""
    started: float
    """With ``ticks`` and ``boot`` as in ``Mark``: a process with this PID and another start is a different process."""
    host: str
    port: int
    epoch: int
    gpus: tuple[int, ...]
    memory_mib: int
    log: str
    key: str = Field(repr=False)
    secrets: tuple[str, ...] = Field(default=(), repr=False)
    """Values of its environment that must be masked."""
    ready: bool = False
    loaded_s: float | None = None
    remove: tuple[str, ...] = ()
    """The command that removes its container, after its processes are gone."""
    scratch: str = ""
    """Its temporary folder in a container."""
    ticks: int = 0
    boot: str = ""
    hang_after_s: float = 300.0
    """``Model.hang_after_s`` when it was started."""
    sleeps: bool = False
    """It was started so that it can be put to sleep."""
    bare_mib: tuple[int, ...] = ()
    """Memory in use on each of its GPUs before it was started."""
    held_mib: int = 0
    """What it held of each of its GPUs at least once it was loaded; 0: not known."""
    sleep: Literal["", "sleep", "asleep", "wake"] = ""
    """It is being put to sleep, sleeps, or is being woken."""
    slept: bool = False
    """It has slept once."""
    sleep_mib: int = 0
    """Host memory that it holds for its sleep; until it has slept, what it may take."""
    kept_mib: int = 0
    """What it holds of each of its GPUs while it sleeps."""
    freed_mib: tuple[int, ...] = ()
    """What it freed of each of its GPUs when it last fell asleep."""
    canary_noted: bool = False
    canary_text: str = ""
    canary_numbers: tuple[float, ...] = ()
    """Its answer to the canary after it was loaded."""

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


def make_engine_folder(layout: Layout, engine: str) -> Path:
    """An empty private folder for the Unix socket and the temporary files of ``engine``; removed with its record."""
    folder = engine_folder(record_path(layout, engine))
    shutil.rmtree(folder, ignore_errors=True)  # an earlier engine's
    private_folder(folder.parent)
    private_folder(folder)
    return folder


def file_name(engine: str) -> str:
    """``engine`` as a file's name: characters other than letters, digits, ``.``, ``-`` and ``_`` become ``_``."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", engine)


def write(layout: Layout, record: EngineRecord) -> None:
    """Write or replace a record, atomically, 0600."""
    private_folder(layout.engine_records)
    _file(record_path(layout, record.engine)).write(record)


def remove(layout: Layout, engine: str) -> None:
    """Remove the record of an engine that is gone, its folder, and its temporary one in a container."""
    _remove(layout, record_path(layout, engine))


def _remove(layout: Layout, path: Path) -> None:
    for folder in (engine_folder(path), layout.scratch / path.stem):
        shutil.rmtree(folder, ignore_errors=True)
    path.unlink(missing_ok=True)


def read_all(layout: Layout) -> Iterator[EngineRecord]:
    """Every record on this node that can be read."""
    for path in sorted(layout.engine_records.glob("*.json")):
        if (record := _file(path).read_or_none()) is not None:
            yield record


def garbled(layout: Layout) -> tuple[Path, ...]:
    """Files that are no valid records, though their engines may still run. (Another block's agent may have removed one
    meanwhile.)"""
    found = sorted(layout.engine_records.glob("*.json"))
    return tuple(path for path in found if _file(path).read_or_none() is None and path.exists())


def end_unrecorded(layout: Layout, block: str) -> None:
    """Kill the engines of ``block`` whose records are garbled, and remove those records. Blocks.

    An engine is found by its log, which has the record's name: it writes to it, or has it in its environment
    (``ENGINE_MARK``). It cannot be used any more: its key is lost.
    """
    for path in garbled(layout):
        log = layout.engine_logs / f"{path.stem}.log"
        writing = (known for pid in own_pids() if writes_to(pid, log) and (known := mark(pid)) is not None)
        living = tuple(dict.fromkeys((*writing, *strays(str(log), mark_of_dead(0)))))
        if living and not any(carries_mark(known.pid, block) for known in living):
            continue  # another block's, on the same machine
        logger.warning("engine record garbled path=%s ended=%s", path, [known.pid for known in living])
        end(living, grace_s=0.0)
        _remove(layout, path)


def _file(path: Path) -> StateFile[EngineRecord]:
    return StateFile(path, EngineRecord)


def completed(layout: Layout, record: EngineRecord) -> EngineRecord:
    """The record of an engine that runs; one that an earlier version wrote becomes one of this version: its process
    could not be known any more, by the wall clock alone, once that is set."""
    found = mark(record.pid)
    if record.boot or found is None:
        return record
    record = record.model_copy(update={"ticks": found.ticks, "boot": found.boot})
    try:
        write(layout, record)
    except (GatewayError, OSError) as error:  # the engine is adopted all the same
        logger.warning("record not completed engine=%s why=%s", record.engine, error)
    return record
