"""Memory that fake engines hold together, so that a test can prove that it was never over-committed.

Each engine leaves ``PID.json`` in a folder; ``claim`` adds up those whose process lives and writes the sum to
``peaks.jsonl``. A process that was killed holds nothing, exactly as with real memory.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path


def claim(folder: Path, mib: int, room_mib: int = 0) -> bool:
    """Count ``mib`` for this process, in place of what it held. False, not counted, if all would hold more than
    ``room_mib`` (0: no limit)."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / f"{os.getpid()}.json").unlink(missing_ok=True)
        total = held_mib(folder) + mib
        with (folder / "peaks.jsonl").open("a") as peaks:
            peaks.write(json.dumps({"held_mib": total, "pid": os.getpid(), "at": time.time()}) + "\n")
        if room_mib and total > room_mib:
            return False
        record = {"mib": mib, "pid": os.getpid(), "started": _start_ticks(os.getpid())}
        (folder / f"{os.getpid()}.json").write_text(json.dumps(record))
        return True


def held_mib(folder: Path) -> int:
    """The memory that live processes hold now, in MiB."""
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sum(r["mib"] for r in records if _start_ticks(r["pid"]) == r["started"])


def peak_mib(folder: Path) -> int:
    """The most that was ever held, or asked for, at one time."""
    path = folder / "peaks.jsonl"
    return (
        max((json.loads(line)["held_mib"] for line in path.read_text().splitlines()), default=0) if path.exists() else 0
    )


def _start_ticks(pid: int) -> int | None:
    """When the process began, in clock ticks; ``None`` if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])
