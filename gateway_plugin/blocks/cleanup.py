"""The last act of a block: end every engine recorded on its node, and every other process that still runs in it.

An engine outlives its agent on purpose: the next agent adopts or ends it. When the block itself ends there is no next
agent.
"""

from __future__ import annotations

from pathlib import Path

import psutil

from gateway_plugin.engine_records import complain, end_engines
from gateway_plugin.processes import block_processes, end


def clean_up(records: Path, block: str, folder: Path) -> bool:
    """End the engines of ``block`` recorded in ``records``, and every other process of the block, whose temporary
    folder is ``folder``. Whether all of it has ended; what has not is named on stderr, an error as well."""
    clean = True
    try:
        for name in end_engines(records, block):
            complain(f"{name}: the engine could not be ended")
            clean = False
    except (OSError, psutil.Error) as error:  # the rest of the block is to end all the same
        complain(f"engines: {type(error).__name__}: {error}")
        clean = False
    try:
        for process in end(lambda: block_processes(block, folder), grace_s=0):
            complain(f"process {process.pid} could not be ended")
            clean = False
    except (OSError, psutil.Error) as error:
        complain(f"processes: {type(error).__name__}: {error}")
        clean = False
    return clean
