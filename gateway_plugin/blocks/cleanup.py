"""The last act of a block: end every engine recorded on its node, and every other process that still runs in it.

An engine outlives its agent on purpose: the next agent adopts or ends it. When the block itself ends there is no next
agent.
"""

from __future__ import annotations

from pathlib import Path

from gateway_plugin.engine_records import complain, end_engines
from gateway_plugin.processes import block_processes, end


def clean_up(records: Path, block: str, folder: Path) -> bool:
    """End the engines of ``block`` recorded in ``records``, and whatever else runs in it, whose temporary folder is
    ``folder``. Whether all of it has ended; what has not is named on stderr."""
    failed = end_engines(records, block)
    for name in failed:
        complain(f"{name}: the engine could not be ended")
    left = end(lambda: block_processes(block, folder), grace_s=0)
    for process in left:
        complain(f"process {process.pid} could not be ended")
    return not failed and not left
