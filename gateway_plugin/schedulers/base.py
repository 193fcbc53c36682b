"""What the pool asks of a scheduler: submit, look, cancel, and find again. One implementation a kind of scheduler.

Parsl's providers submit well but know only the jobs of their own process, so everything that must survive a restart
is behind this seam: ``local.py`` finds jobs by PID and start; a queue's finds them by name.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gateway_plugin.blocks.ledger import Block, BlockPhase, Job
from gateway_plugin.errors import ConfigError, GatewayError
from gateway_plugin.paths import Layout, private_folder
from gateway_plugin.site import what_went_wrong

_CLOCK = re.compile(r"(\d+):(\d+):\d+")
_DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True)
class Seen:
    """What a scheduler says of a block's job now. Times are seconds since the epoch, ``None`` where it does not say."""

    phase: BlockPhase
    reason: str | None = None
    """Why it pends or how it ended, for people."""
    node: str | None = None
    starts_at: float | None = None
    """When it started; of a pending one, when the scheduler expects it to."""
    ends_at: float | None = None
    """When its walltime ends; of one that ended, when that was."""


ASK_EVERY_S = 10.0
"""How often a queue is asked of jobs that are as they were: the monitor looks every two seconds, and there may be many
node types, on a controller that a whole site shares."""
_FRESH_S = 60.0
"""A job asked for so lately is asked of at every look."""


class Pace:
    """When a queue is to be asked again. ``clock``: monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._asked_at = float("-inf")

    def due(self, blocks: Sequence[Block], now: float) -> bool:
        """Whether to ask now: at once while something is under way with one of ``blocks``, else every ``ASK_EVERY_S``.

        ``now``: seconds since the epoch. A yes counts as asked.
        """
        moving = any(block.phase is BlockPhase.CANCELLING or abs(now - block.asked_at) < _FRESH_S for block in blocks)
        if not moving and self._clock() < self._asked_at + ASK_EVERY_S:
            return False
        self._asked_at = self._clock()
        return True


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
        """The job of block ``name``, in whatever process it was submitted; ``None`` if the scheduler has none.

        Raises:
            ServiceError: the scheduler could not be asked: nothing can be said now, ask again.
        """

    def cancel(self, block: Block, forced: bool) -> None:
        """Tell the job to end, ``forced`` without asking. Nothing happens if it is gone or no longer the same job."""


def forget_oldest(*known: dict[Any, Any], keep: int = 1000) -> None:
    """Bound what is remembered of blocks: what was noted first is forgotten first."""
    for notes in known:
        while len(notes) > keep:
            del notes[next(iter(notes))]


def jobs_for(provider: Any, layout: Layout) -> Jobs:
    """The jobs of a Parsl provider. Raises ``ConfigError`` for one whose jobs could not be submitted or found again.

    (1) A site's own provider may bring them, with a method ``gateway_jobs(layout) -> Jobs``. (2) one of a queue:
    ``SlurmProvider``, ``PBSProProvider``. (3) ``LocalProvider``.
    """
    demand_known(provider)
    if callable(bring := getattr(provider, "gateway_jobs", None)):  # (1)
        return _brought(type(provider).__name__, bring, layout)
    if is_queue(provider):  # (2)
        return queue_jobs(provider, private_folder(shared_script_place(layout)), layout)
    from gateway_plugin.schedulers.local import LocalJobs

    return LocalJobs(provider, script_folder(layout), layout)  # (3)


def demand_known(provider: Any) -> None:
    """Raises ``ConfigError`` for a provider that ``jobs_for`` has no jobs of, or with a walltime that is none."""
    from parsl.providers import LocalProvider

    walltime_s(provider)
    own = callable(getattr(provider, "gateway_jobs", None))
    if not (own or is_queue(provider) or isinstance(provider, LocalProvider)):
        raise ConfigError(
            f"{type(provider).__name__}: blocks of this Parsl provider cannot be found again after a restart; "
            "expected a LocalProvider, a SlurmProvider or a PBSProProvider"
        )


def _brought(provider: str, bring: Callable[[Layout], Any], layout: Layout) -> Jobs:
    """The jobs that a site's own provider brings. Its code is the site's: whatever it raises is a mistake in it."""
    try:
        jobs: Jobs = bring(layout)
    except GatewayError:
        raise
    except Exception as error:  # noqa: BLE001
        raise ConfigError(f"{provider}.gateway_jobs: {what_went_wrong(error)}") from None
    missing = [verb for verb in ("submit", "look", "find", "cancel", "in_doubt_s") if not hasattr(jobs, verb)]
    if missing:
        raise ConfigError(
            f"{provider}.gateway_jobs gave {type(jobs).__name__} without {', '.join(missing)}; "
            "expected what gateway_plugin.schedulers.base.Jobs asks for"
        )
    return jobs


def walltime_s(provider: Any) -> int | None:
    """The walltime of a provider's jobs in seconds; seconds in it do not count, as Parsl asks Slurm for minutes.

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


def is_queue(provider: Any) -> bool:
    """Whether this is a Parsl provider of a batch queue that the gateway knows."""
    from parsl.providers import PBSProProvider, SlurmProvider

    return isinstance(provider, (SlurmProvider, PBSProProvider))


def queue_jobs(provider: Any, scripts: Path, layout: Layout) -> Jobs:
    """The jobs of a queue's provider, whose scripts lie in ``scripts``. Raises ``ConfigError``."""
    from parsl.providers import SlurmProvider

    if isinstance(provider, SlurmProvider):
        from gateway_plugin.schedulers.slurm import SlurmJobs

        return SlurmJobs(provider, scripts, layout)
    from gateway_plugin.schedulers.pbs import PbsJobs

    return PbsJobs(provider, scripts, layout)


def script_folder(layout: Layout) -> Path:
    """Where job scripts lie, made if it is not there."""
    return private_folder(script_place(layout))


def script_place(layout: Layout) -> Path:
    """In the state folder, or in the run folder if that path needs quoting (Parsl does none)."""
    scripts = layout.block_scripts
    return scripts if shlex.quote(str(scripts)) == str(scripts) else layout.run / "scripts"


def shared_script_place(layout: Layout) -> Path:
    """Where scripts of jobs on other machines lie: in the state folder. Raises ``ConfigError`` if it needs quoting.

    The run folder is this node's own: what a job writes there would never be seen.
    """
    scripts = layout.block_scripts
    if shlex.quote(str(scripts)) != str(scripts):
        raise ConfigError(
            f"{layout.state}: Parsl does not quote the path of a job's script; expected a state folder (GATEWAY_STATE) "
            "without blanks, quotes and other signs of the shell"
        )
    return scripts


def last_words(*outputs: Path) -> str:
    """``: LINE``, the last line of the first of ``outputs`` that has one, for the end of a message; else nothing."""
    for output in outputs:
        try:
            lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            continue
        if lines:
            return f": {lines[-1][:200]}"
    return ""
