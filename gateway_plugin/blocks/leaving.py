"""When a block leaves, and the settings of its program. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

CANCELLED = 143
"""Exit code of a block that was cancelled, as the shell has it for SIGTERM."""

NO_FOLDER = 73
"""Exit code where the node has no place for it (``EX_CANTCREAT``), or no address."""


@dataclass(frozen=True)
class Leaving:
    """When a block leaves. All in seconds."""

    walltime_s: int | None = None
    """Of its job, counted from the script's start unless Slurm knows better; ``None``: it has none."""
    before_end_s: float = 30.0
    """``Site.leave_before_end_s``"""
    notice_s: float = 20.0
    """``Site.notice_s``"""
    look_every_s: int = 10
    """Interval of looks for its mark: one look at a folder of the shared file system."""
    ask_every_s: int = 300
    """Interval at which it asks Slurm for its job's end, plus up to half as much, at random. A thousand blocks ask
    three times a second in all, each for one job, which is the cheapest question there is."""


@dataclass(frozen=True)
class Settings:
    """What the job's script tells this program, as JSON. Paths of secrets, never a secret.

    A job may wait in a queue while the gateway is replaced by a later version or an earlier one: a new field has a
    default, and fields that this version does not know are left out.
    """

    name: str
    head: str
    """``IP:port`` of the Ray head."""
    state: str
    """The state folder."""
    run_root: str = "/tmp"  # noqa: S108 - as in Layout.run
    python: str = "python"
    """The interpreter with Ray."""
    ray: tuple[str, ...] = ()
    """Options of ``ray start``."""
    environment: dict[str, str] = field(default_factory=dict)
    """For Ray and all that runs in the block."""
    leaving: Leaving = Leaving()
    report: str = ""
    """Do not start Ray: look at the node, and write what is found to this file."""

    def text(self) -> str:
        """As JSON, for ``parse``."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Settings:
        """From ``text()``, of this version or another."""
        said = json.loads(text)
        leaving = Leaving(**_known(Leaving, said.get("leaving", {})))
        return cls(**{**_known(cls, said), "ray": tuple(said.get("ray", ())), "leaving": leaving})


def _known(kind: type[Settings | Leaving], said: Mapping[str, Any]) -> dict[str, Any]:
    return {one.name: said[one.name] for one in fields(kind) if one.name in said}


@dataclass
class Watch:
    """When the block is to leave. Pure. ``now``: seconds on the machine's clock, which is never set; ``wall``: since
    the epoch, as Slurm reports times and people read them."""

    leaving: Leaving
    ends: float | None = None
    """When its walltime ends."""
    until: float | None = None
    """Cancelled by others: when it leaves at the latest."""
    code: int = CANCELLED
    look_at: float = float("-inf")
    ask_at: float = float("-inf")
    _told_end: int | None = field(default=None, repr=False)

    def told_end(self, end: int, now: float, wall: float) -> bool:
        """Slurm says when its job ends, seconds since the epoch. Whether that is news."""
        if end == self._told_end:
            return False
        self._told_end, self.ends = end, now + end - wall
        return True

    def give_notice(self, code: int, now: float) -> bool:
        """Others end it. Whether that is news."""
        if self.until is not None:
            return False
        self.until, self.code = now + self.leaving.notice_s, code
        return True

    def asked(self, now: float, chance: float) -> None:
        """Slurm is being asked; again after a while, and shortly before the end, which may be another one since.

        ``chance``: between 0 and 1, at random.
        """
        self.ask_at = now + self.leaving.ask_every_s * (1 + chance / 2)
        if self.ends is not None:
            last = self.ends - self.leaving.before_end_s - 60
            self.ask_at = last if now + 60 < last < self.ask_at else self.ask_at

    def reason(self, now: float, marked: Callable[[], bool], engines: Callable[[], bool]) -> tuple[str, int] | None:
        """Why it leaves now, and its exit code; ``None``: it stays.

        (1) a notice, and no engine is left; (2) the notice ends; (3) its mark; (4) its walltime.
        """
        if self.until is not None:
            if not engines():  # (1)
                return "no engine is left", self.code
            if now >= self.until:  # (2)
                return "its notice ends", self.code
        if now >= self.look_at:
            self.look_at = now + self.leaving.look_every_s
            if marked():  # (3)
                return "told to by its mark", CANCELLED
        if self.ends is not None and now >= self.ends - self.leaving.before_end_s:  # (4)
            return "its walltime ends", 0
        return None
