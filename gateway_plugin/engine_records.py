"""What a block and its node's agent share of engine records: which processes are an engine's, and how they are ended.

One JSON file an engine in the node's run folder; the agent writes it (``serve.agent.records``) and adopts by it. When a
block ends, no agent comes any more: then the block itself ends the recorded engines.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gateway_plugin.files import Garbled, read_object
from gateway_plugin.processes import (
    Mark,
    alive,
    carries_mark,
    descendants,
    end,
    environment,
    group_members,
    has_its_pid,
    mark,
    own_pids,
    parent_pid,
    read_mark,
    writes_to,
)

TERM_GRACE_S = 10.0
"""Between SIGTERM and SIGKILL of an engine."""
ENGINE_MARK = "GATEWAY_ENGINE"
"""The environment variable that carries the path of an engine's log into each of its processes: also into one that
leaves the process group, or that a container's monitor starts."""
_REMOVE_S = 60.0


@dataclass(frozen=True)
class RecordedEngine:
    """What ending an engine needs of its record; the file holds more."""

    path: Path
    block: str
    leader: Mark
    log: str = ""
    """The file that its output goes to, and that of its children."""
    remove: tuple[str, ...] = ()
    """The command that removes its container."""
    scratch: str = ""
    """Its temporary folder in a container."""


def engine_folder(record: Path) -> Path:
    """The folder of the engine with this record, for its Unix socket and its temporary files: short, because AF_UNIX
    paths end at 107 characters, and libraries put sockets into temporary folders."""
    return record.parent.parent / "doors" / hashlib.sha256(record.stem.encode()).hexdigest()[:12]


def complain(words: str) -> None:
    """A line on stderr. A full disk costs the line and nothing else: neither now, nor where a buffer is flushed."""
    with suppress(OSError):
        os.write(2, f"cleanup: {words}\n".encode(errors="replace"))


def read_records(folder: Path) -> tuple[RecordedEngine, ...]:
    """Every readable record in ``folder``. A garbled one is named on stderr and skipped: the others count."""
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            document = read_object(path) or {}
            leader, block = read_mark(document), str(document["block"])
        except (OSError, Garbled, KeyError) as error:
            complain(f"{path}: not an engine record: {type(error).__name__}: {error}")
            continue
        if leader is None:
            complain(f"{path}: not an engine record: it names no process")
            continue
        remove, scratch = document.get("remove") or (), str(document.get("scratch", ""))
        command = tuple(map(str, remove)) if isinstance(remove, list | tuple) else ()
        records.append(RecordedEngine(path, block, leader, str(document.get("log", "")), command, scratch))
    return tuple(records)


def members(record: RecordedEngine) -> tuple[Mark, ...]:
    """The living processes of an engine: its process group, if its leader is the recorded one, and its strays.

    Without the leader, a process of a group with its number is the engine's only if it carries the block's name, or
    writes to the engine's log: vLLM's core sets a process title, which overwrites its environment.
    """
    group = group_members(record.leader)
    if not alive(record.leader):
        group = tuple(
            known for known in group if carries_mark(known.pid, record.block) or writes_to(known.pid, record.log)
        )
    elif record.leader.pid not in {known.pid for known in group}:
        group = (record.leader, *descendants(record.leader.pid))
    return tuple(dict.fromkeys((*group, *strays(record.log, record.leader))))


def strays(log: str, leader: Mark, wrapper: int = 0) -> tuple[Mark, ...]:
    """The living processes, in the process group or not, of the engine whose log is ``log``, by their environment.

    Without ``wrapper`` and the parent of ``leader``: bubblewrap reaps the engine, and has its exit code.
    """
    if not log:
        return ()
    spared = (wrapper, parent_pid(leader.pid) if has_its_pid(leader) else 0)
    found = (mark(pid) for pid in own_pids() if pid not in spared and environment(pid).get(ENGINE_MARK) == log)
    return tuple(known for known in found if known is not None)


def clear_away(remove: tuple[str, ...], scratch: str) -> None:
    """Remove an engine's container and its temporary folder, once its processes are gone. Blocks up to a minute."""
    if remove:
        try:
            done = subprocess.run(remove, capture_output=True, text=True, timeout=_REMOVE_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            complain(f"{' '.join(remove)}: {error}")
        else:
            if done.returncode:
                complain(f"{' '.join(remove)}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)


def end_engines(folder: Path, block: str | None = None, grace_s: float = TERM_GRACE_S) -> tuple[str, ...]:
    """End the engines recorded in ``folder`` (of block ``block``, if one is named) and remove their records.

    Returns the names of records whose engine could not be ended; those stay.
    """
    records = [record for record in read_records(folder) if block in (None, record.block)]
    stubborn = set(end(lambda: [known for record in records for known in members(record)], grace_s))
    failed = []
    for record in records:
        if stubborn and stubborn & set(members(record)):
            failed.append(record.path.name)
        else:
            shutil.rmtree(engine_folder(record.path), ignore_errors=True)
            clear_away(record.remove, record.scratch)
            record.path.unlink(missing_ok=True)
    return tuple(failed)
