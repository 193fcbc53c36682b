"""The shared folder of a multi-user endpoint: every mapped user reads what lies there, none but root changes it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from gateway_plugin.errors import ConfigError

READABLE_UMASK = 0o022
"""For what is made there: root's own may be 077."""


def check_reach(path: Path) -> None:
    """Whether everybody may read below the folders that lead to ``path``. Raises ``ConfigError``."""
    for folder in reversed(path.resolve().parents):
        if folder.exists() and not folder.stat().st_mode & 0o001:
            raise ConfigError(f"{folder}, on the way to {path}, lets nobody pass: mapped users need to read below it.")


def check_only_root_changes(path: Path) -> None:
    """Whether none but root could put something else at ``path``. Raises ``ConfigError`` naming who else could."""
    way = path.resolve()
    for folder in (way, *way.parents):
        try:
            found = folder.stat()
        except FileNotFoundError:
            continue
        sticky = found.st_mode & stat.S_ISVTX and folder != way  # as /tmp: each entry is its owner's
        if found.st_uid != 0 or (found.st_mode & 0o022 and not sticky):
            raise ConfigError(
                f"{folder} can be changed by others than root, who could so run code as every mapped user: "
                f"take a folder instead of {path} that only root can write to, all the way up."
            )


def make(path: Path) -> None:
    """Make the folder, 0755, whatever the umask is. Raises ``ConfigError`` if it cannot be shared there."""
    check_only_root_changes(path)
    check_reach(path)
    before = os.umask(READABLE_UMASK)
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    finally:
        os.umask(before)
    path.chmod(0o755)


def check_program(program: Path) -> None:
    """Whether everybody may run ``program`` of an environment. Raises ``ConfigError``."""
    for path in (program, program.parent / "python"):
        check_reach(path)
        if path.resolve().stat().st_mode & 0o005 != 0o005:
            raise ConfigError(
                f"{path} cannot be run by mapped users: remove {program.parent.parent} and configure again, "
                "or name a readable one with --venv."
            )
