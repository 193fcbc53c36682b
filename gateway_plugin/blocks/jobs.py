"""What the pool asks of a scheduler: submit, look, cancel, and find again. One implementation a kind of scheduler.

Parsl's providers submit well but know only the jobs of their own process, so everything that must survive a restart
is behind this seam: ``local.py`` finds jobs by PID and start time; a queue's finds them by name.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gateway_plugin.blocks.ledger import Block, BlockPhase, Job
from gateway_plugin.errors import ConfigError
from gateway_plugin.layout import Layout, private_folder


@dataclass(frozen=True)
class Seen:
    """What a scheduler says of a block's job now. ``reason``: why it pends or how it ended, for people."""

    phase: BlockPhase
    reason: str | None = None


class Jobs(Protocol):
    """The jobs of one node type. Calls may block for as long as the scheduler's commands do."""

    in_doubt_s: float
    """How long a submit that was cut short may take to show up; looked for until then, and forgotten after."""

    def submit(self, name: str, script: str) -> Job:
        """Submit ``script`` as a job with ``name`` in its job name.

        Raises:
            ServiceError: the scheduler refused, in its own words: there is no job. Anything else that is raised leaves
                the submit in doubt.
        """

    def look(self, blocks: Sequence[Block]) -> Mapping[str, Seen]:
        """What each block's job does, by block name. No entry: nothing can be said now, ask again.

        Works for jobs of an earlier process too, from ``block.job`` alone. Never takes absence for completion.
        """

    def find(self, name: str) -> Job | None:
        """The job of block ``name``, in whatever process it was submitted; ``None`` if the scheduler has none."""

    def cancel(self, block: Block, forced: bool) -> None:
        """Tell the job to end, ``forced`` without asking. Nothing happens if it is gone or no longer the same job."""


def jobs_for(provider: Any, layout: Layout) -> Jobs:
    """The jobs of a Parsl provider. Raises ``ConfigError`` for one whose jobs could not be found again.

    (1) A site's own provider may bring them, with a method ``gateway_jobs(layout) -> Jobs``. (2) ``LocalProvider``.
    """
    if callable(bring := getattr(provider, "gateway_jobs", None)):  # (1)
        jobs: Jobs = bring(layout)
        return jobs
    from parsl.providers import LocalProvider

    if isinstance(provider, LocalProvider):  # (2)
        from gateway_plugin.blocks.local import LocalJobs

        return LocalJobs(provider, script_folder(layout), layout)
    raise ConfigError(
        f"{type(provider).__name__}: blocks of this Parsl provider cannot be found again after a restart; "
        "expected a LocalProvider"
    )


def script_folder(layout: Layout) -> Path:
    """Where job scripts lie, made if it is not there."""
    return private_folder(script_place(layout))


def script_place(layout: Layout) -> Path:
    """In the state folder, or in the run folder if that path needs quoting (Parsl does none)."""
    scripts = layout.block_scripts
    return scripts if shlex.quote(str(scripts)) == str(scripts) else layout.run / "scripts"
