"""``gateway up --dry-run``: the job script of each node type, exactly as Parsl's provider writes it. Nothing is
started, created or submitted.

Only the provider has its scheduler's directives, so a copy of it submits to a scheduler that does not exist: the one
method through which Parsl's cluster providers run commands is replaced by one that only records them.
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
from gateway_plugin.service.deployment import planned
from gateway_plugin.service.ray_head import head_address
from gateway_plugin.service_state import record_here
from gateway_plugin.site import NodeType, Site
from gateway_plugin.sizing.catalog_file import read_catalog

_ACCEPTED = "Submitted batch job 0"
"""The output of ``sbatch``; other providers take the whole line for the job's id."""


@dataclass(frozen=True)
class RehearsedJob:
    """One node type's job."""

    node_type: str
    block: str
    """The block's name; every block has its own."""
    command: str
    """The command that would submit the script; empty for a block that is a process on this machine."""
    text: str
    """The complete script."""


def rehearsed(node_type: NodeType, name: str, script: str, layout: Layout) -> RehearsedJob:
    """The job of block ``name``: (1) of a queue's provider, with its directives; (2) of any other, the script
    unchanged. Rejects what ``up`` would reject.

    Args:
        script: the text from ``block_script``.
        layout: determines the script's path.

    Raises:
        ConfigError: the provider's jobs could not be blocks, or the path of the state folder needs quoting.
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
        queue_scheduler(provider, Path(scratch), layout)  # its additions to the job and its checks
        provider.execute_wait = note
        provider.submit(script, 1, name)
        written = [path for path in Path(scratch).iterdir() if path.is_file()]
        if len(commands) != 1 or len(written) != 1:
            raise ConfigError(f"{type(node_type.provider).__name__}: how it submits a job cannot be shown")
        text = written[0].read_text(encoding="utf-8").replace(scratch, str(folder))
        command = " ".join(commands[0].replace(scratch, str(folder)).split())
    return RehearsedJob(node_type.name, name, command, text)


def rehearse(
    state: Path, site_reference: str | None, models: Path | None, *, port: int | None = None
) -> tuple[tuple[RehearsedJob, ...], str]:
    """The job of each node type, as ``up`` with the same arguments would submit it, and a note on values unknown here.

    Raises:
        ConfigError: site, catalog (if one is given) or environment are invalid.
    """
    from gateway_plugin.blocks.node_provider import block_name, script_for

    layout = Layout.of(state)
    notes: list[str] = []

    def address_of(site: Site) -> str:
        """The head's address, and a note if this is another machine: a dry run works on any machine."""
        try:
            return head_address(site)
        except ConfigError as error:
            if not site.head_interface:
                raise
            notes.append(f"{error.message}; printed as ADDRESS-OF-{site.head_interface}")
            return f"ADDRESS-OF-{site.head_interface}"

    known = record_here(layout) if layout.state.is_dir() else None
    gateway = planned(layout, known, site_reference, port, address_of)
    if models is not None:
        read_catalog(models, gateway.site)
    jobs = []
    for node_type in gateway.site.node_types:
        name = block_name(node_type.name)
        script = script_for(name, node_type, layout, gateway.ray_address, gateway.site)
        jobs.append(rehearsed(node_type, name, script, layout))
    return tuple(jobs), "".join(notes)
