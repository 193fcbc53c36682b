"""The user that runs the chain: if tests run as root, a user without privileges; else the user that runs the tests."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_UNPRIVILEGED = "nobody"


@dataclass(frozen=True)
class Account:
    """A local user, with a home of its own in the tests' folder."""

    name: str
    uid: int
    gid: int
    home: Path

    @property
    def switches(self) -> bool:
        """Whether its processes are started as another user than the tests' own."""
        return self.uid != os.getuid()

    def environment(self, **more: str) -> dict[str, str]:
        """The minimal environment for a process of this user."""
        kept = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
        return {**kept, "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(self.home), "USER": self.name, **more}

    def popen(
        self, argv: Sequence[str | Path], log: IO[bytes] | int, environment: Mapping[str, str], **more: Any
    ) -> subprocess.Popen[bytes]:
        """Start a program as this user, in a session of its own."""
        if self.switches:
            more |= {"user": self.uid, "group": self.gid, "extra_groups": []}
        return subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=self.home,
            start_new_session=True,
            **more,
        )

    def own(self, *paths: Path) -> None:
        """Give paths to this user."""
        for path in paths:
            os.chown(path, self.uid, self.gid)

    def folder(self, path: Path) -> Path:
        """A 0700 folder of this user."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.own(path)
        return path


def account(home: Path) -> Account:
    """The account to run as; ``home`` is made for it."""
    found = pwd.getpwnam(_UNPRIVILEGED) if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    made = Account(found.pw_name, found.pw_uid, found.pw_gid, home)
    made.folder(home)
    return made


def reachable_python() -> Path | None:
    """An interpreter that other users may run: the tests' own, or the system's; ``None``: there is none."""
    for path in (Path(getattr(sys, "_base_executable", sys.executable)), Path("/usr/bin/python3")):
        real = path.resolve()
        if real.is_file() and all(parent.stat().st_mode & 0o001 for parent in (real, *real.parents)):
            return real
    return None


def end(child: subprocess.Popen[bytes], patience_s: float = 15.0) -> None:
    """End a program of the tests and its session: first by SIGTERM, then killed."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sent)
        try:
            child.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
        if sent is signal.SIGTERM and not _session_lives(child.pid):
            return


def _session_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
