"""The scheduler interface: submit a job, read its status, cancel it, and find it again. Independent of implementations.

Parsl's providers submit well but track only the jobs of their own process, so everything that must survive a restart
is behind ``Scheduler``: ``local.py`` finds jobs by PID and start, a queue's (``queue.py``) by name. ``select.py``
chooses the implementation for a provider.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gateway_plugin.blocks.ledger import Block, Job
from gateway_plugin.errors import ConfigError, ServiceError
from gateway_plugin.paths import Layout, private_folder
from gateway_plugin.phases import BlockPhase

_CLOCK = re.compile(r"(\d+):(\d+):\d+")
_DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?")

ASK_EVERY_S = 10.0
"""Interval of polls while nothing changes: the monitor asks every two seconds, and a controller serves a whole site."""
_FRESH_S = 60.0
"""A job younger than this is polled each time."""


@dataclass(frozen=True)
class JobStatus:
    """A job as its scheduler reports it. Times are seconds since the epoch, ``None`` where not reported."""

    phase: BlockPhase
    reason: str | None = None
    """Why it pends or how it ended, for people."""
    node: str | None = None
    starts_at: float | None = None
    """Its start; of a pending job the scheduler's estimate."""
    ends_at: float | None = None
    """The end of its walltime; of an ended job its end."""
    never_clears: bool = False
    """Of a pending job: whether ``reason`` lasts until a person changes the job or a limit."""


class Scheduler(Protocol):
    """The jobs of one node type. Calls may block for as long as the scheduler's commands do."""

    in_doubt_s: float
    """How long the job of an interrupted submit may take to appear; it is searched for until then."""

    def submit(self, name: str, script: str) -> Job:
        """Submit ``script`` as a job with ``name`` in its job name.

        Raises:
            ServiceError: the scheduler rejected the job, with its message: there is no job. Any other exception
                leaves the submit in doubt.
        """

    def status(self, blocks: Sequence[Block]) -> Mapping[str, JobStatus]:
        """The status of each block's job, by block name. No entry: unknown for now, ask again.

        Works for jobs of an earlier process too, from ``block.job`` alone. Never takes absence for completion.
        """

    def find(self, name: str) -> Job | None:
        """The job of block ``name``, submitted by any process; ``None`` if the scheduler has none.

        Raises:
            SchedulerSilent: the scheduler did not answer: unknown for now, ask again.
        """

    def cancel(self, block: Block, forced: bool) -> None:
        """End the job, ``forced`` without a grace period. No effect if it has ended or its id is another job's."""


class SchedulerSilent(ServiceError):
    """A command of the scheduler gave no answer: its server is away, or busy for longer than we wait."""


class PollLimiter:
    """When to poll a queue again. ``clock``: monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._asked_at = float("-inf")

    def due(self, blocks: Sequence[Block], now: float) -> bool:
        """Whether to poll now: always while one of ``blocks`` is new or being cancelled, else every ``ASK_EVERY_S``.

        ``now``: seconds since the epoch. ``True`` counts as a poll.
        """
        moving = any(block.phase is BlockPhase.CANCELLING or abs(now - block.asked_at) < _FRESH_S for block in blocks)
        if not moving and self._clock() < self._asked_at + ASK_EVERY_S:
            return False
        self._asked_at = self._clock()
        return True


def walltime_s(provider: Any) -> int | None:
    """The walltime of a provider's jobs in seconds; its own seconds are dropped, as Parsl asks Slurm for minutes.

    ``None`` where it has none, as on this machine. Raises ``ConfigError`` for one that Parsl does not take, such as
    Slurm's own form for days.
    """
    walltime = getattr(provider, "walltime", None)
    if walltime is None:
        return None
    clock, days = _CLOCK.fullmatch(str(walltime)), _DAYS.fullmatch(str(walltime))
    if clock is not None:
        return (int(clock[1]) * 60 + int(clock[2])) * 60
    example = "02:00:00"
    if days is not None:
        example = f"{int(days[1]) * 24 + int(days[2]):02}:{days[3] or '00'}:{days[4] or '00'}"
    raise ConfigError(
        f"{type(provider).__name__}: walltime={walltime!r}: expected hours, minutes and seconds: '{example}'"
    )


def script_folder(layout: Layout) -> Path:
    """The folder of job scripts, created if missing."""
    return private_folder(script_place(layout))


def script_place(layout: Layout) -> Path:
    """In the state folder, or in the run folder if that path needs quoting (Parsl does none)."""
    scripts = layout.block_scripts
    return scripts if shlex.quote(str(scripts)) == str(scripts) else layout.run / "scripts"


def shared_script_place(layout: Layout) -> Path:
    """The folder for scripts of jobs on other machines: in the state folder. Raises ``ConfigError`` if it needs
    quoting.

    The run folder exists on this node only: output that a job writes there would not be visible here.
    """
    scripts = layout.block_scripts
    if shlex.quote(str(scripts)) != str(scripts):
        raise ConfigError(
            f"{layout.state}: Parsl does not quote the path of a job's script; expected a state folder (GATEWAY_STATE) "
            "without blanks, quotes and other signs of the shell"
        )
    return scripts


def last_words(*outputs: Path) -> str:
    """``: LINE``, the last line of the first non-empty file of ``outputs``, as the end of a message; else an empty
    string."""
    for output in outputs:
        try:
            lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            continue
        if lines:
            return f": {lines[-1][:200]}"
    return ""
