"""What a block does last: end every engine recorded on its node, and whatever else still runs in it.

An engine outlives its agent on purpose (it is adopted or ended by whoever comes next); when the block itself goes,
nobody comes next. Run as ``python -m gateway_plugin.blocks.cleanup``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from gateway_plugin.blocks.processes import (
    block_processes,
    carries_mark,
    end,
    own_processes,
    same_process,
    writes_to,
)
from gateway_plugin.processes import Mark, has_its_pid, read_mark

TERM_GRACE_S = 10.0
"""How long an engine has between being asked to end and being killed."""


@dataclass(frozen=True)
class EngineRecord:
    """What ``leave`` needs of an engine's record; the file holds more."""

    path: Path
    block: str
    leader: Mark
    log: str = ""
    """The file that its output goes to, and that of its children."""


def read_records(folder: Path) -> tuple[EngineRecord, ...]:
    """Every readable record in ``folder``. A broken one is named on stderr and skipped: it must not save the others."""
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            leader, block, log = read_mark(document), str(document["block"]), str(document.get("log", ""))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"leave: {path}: not an engine record: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        if leader is None:
            print(f"leave: {path}: not an engine record: it names no process", file=sys.stderr)
            continue
        records.append(EngineRecord(path, block, leader, log))
    return tuple(records)


def members(record: EngineRecord) -> list[psutil.Process]:
    """The live processes of an engine: its process group, if its leader is the recorded one.

    When the leader is gone, a group with its number is the engine's only if its processes carry the block's name, or
    write to the engine's log: vLLM's core gives itself a title, which overwrites its environment.
    """
    leader = same_process(record.leader)
    if leader is None and _is_strangers(record):
        return []
    group = [process for process in own_processes() if _group_of(process) == record.leader.pid]
    if leader is None:
        return [p for p in group if carries_mark(p, record.block) or writes_to(p, record.log)]
    return group if leader in group else [leader, *leader.children(recursive=True)]


def _is_strangers(record: EngineRecord) -> bool:
    """Whether the recorded PID is somebody else's by now. A leader that is dead but not reaped has still its own."""
    try:
        foreign = psutil.Process(record.leader.pid).uids().real != os.getuid()
    except psutil.NoSuchProcess:
        return False
    return foreign or has_its_pid(record.leader) is False


def _group_of(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def end_engines(folder: Path, block: str, grace_s: float = TERM_GRACE_S) -> list[str]:
    """End the engines of block ``block`` recorded in ``folder``, and remove their records.

    Gives the names of records whose engine could not be ended; those stay.
    """
    records = [record for record in read_records(folder) if record.block == block]
    left = end(lambda: [process for record in records for process in members(record)], grace_s)
    stubborn = {process.pid for process in left}
    failed = []
    for record in records:
        if stubborn and any(process.pid in stubborn for process in members(record)):
            failed.append(record.path.name)
        else:
            record.path.unlink(missing_ok=True)
    return failed


def main(argv: list[str] | None = None) -> int:
    """Command line: ``--records FOLDER --block NAME --folder FOLDER``. Exit code 1 if something could not be ended."""
    parser = argparse.ArgumentParser(prog="leave", description="End the engines recorded for a block.")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--block", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="Ray's temporary folder of this block")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second cancel must not stop the cleaning up
    failed = end_engines(arguments.records, arguments.block)
    for name in failed:
        print(f"leave: {name}: the engine could not be ended", file=sys.stderr)
    left = end(lambda: block_processes(arguments.block, arguments.folder), grace_s=0)
    for process in left:
        print(f"leave: process {process.pid} could not be ended", file=sys.stderr)
    return 1 if failed or left else 0


if __name__ == "__main__":
    sys.exit(main())
