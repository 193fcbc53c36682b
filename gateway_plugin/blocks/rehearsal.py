"""What would be submitted: the very job script of each node type, as Parsl's provider writes it. Nothing is submitted.

Only the provider knows its scheduler's directives, so it is asked to submit, a copy of it, with a scheduler that does
not exist: the one method through which Parsl's cluster providers run commands is replaced by one that only notes them.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway_plugin.errors import ConfigError
from gateway_plugin.paths import Layout
from gateway_plugin.schedulers.base import shared_script_place
from gateway_plugin.schedulers.select import demand_known, is_queue, queue_scheduler
from gateway_plugin.site import NodeType, Site

_ACCEPTED = "Submitted batch job 0"
"""As ``sbatch`` says it; other providers take the whole line for the job's id."""


@dataclass(frozen=True)
class RehearsedJob:
    """One node type's job."""

    node_type: str
    block: str
    """A block's name; every block has its own."""
    command: str
    """What would hand the script to the scheduler; empty for a block that is a process on this machine."""
    text: str
    """The script, whole."""


def rehearsed_jobs(site: Site, layout: Layout, head_address: str) -> tuple[RehearsedJob, ...]:
    """The job of each node type. ``head_address``: ``IP:port`` of the Ray head. Raises ``ConfigError``."""
    from gateway_plugin.blocks.node_provider import block_name, script_for

    jobs = []
    for node_type in site.node_types:
        name = block_name(node_type.name)
        jobs.append(rehearsed(node_type, name, script_for(name, node_type, layout, head_address, site), layout))
    return tuple(jobs)


def rehearsed(node_type: NodeType, name: str, script: str, layout: Layout) -> RehearsedJob:
    """The job of block ``name``: (1) of a queue's provider, with its directives; (2) of any other, the script as it is.
    What ``up`` would refuse is refused here too.

    Args:
        script: ``block_script``'s text.
        layout: where the script would lie.

    Raises:
        ConfigError: the provider's jobs could not be a block's, or the path of the state folder needs quoting.
    """
    demand_known(node_type.provider)
    if not is_queue(node_type.provider):  # (2)
        return RehearsedJob(node_type.name, name, "", script)
    commands: list[str] = []
    folder = shared_script_place(layout)
    with tempfile.TemporaryDirectory(prefix="gw-rehearsal-") as scratch:

        def note(command: str, timeout: float | None = None) -> tuple[int, str, str]:
            commands.append(command)
            return 0, _ACCEPTED, ""

        provider: Any = copy.copy(node_type.provider)  # (1)
        provider.resources = {}
        provider.script_dir = scratch
        queue_scheduler(provider, Path(scratch), layout)  # what it adds to the job and what it refuses
        provider.execute_wait = note
        provider.submit(script, 1, name)
        written = [path for path in Path(scratch).iterdir() if path.is_file()]
        if len(commands) != 1 or len(written) != 1:
            raise ConfigError(f"{type(node_type.provider).__name__}: how it submits a job cannot be shown")
        text = written[0].read_text(encoding="utf-8").replace(scratch, str(folder))
        command = " ".join(commands[0].replace(scratch, str(folder)).split())
    return RehearsedJob(node_type.name, name, command, text)
