"""The answers that the function keeps for each local user, managed from outside by the endpoint's commands."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gateway_plugin.errors import ServiceError
from gateway_plugin.globus import function
from gateway_plugin.globus import function_registry as manifest
from gateway_plugin.processes import environment, own_pids

_PATIENCE_S = 20.0


@dataclass(frozen=True)
class User:
    """A local user with processes of the endpoint, and the environment that locates that user's files."""

    uid: int
    gid: int
    environment: tuple[tuple[str, str], ...]


def tasks_done(answers: str) -> int | None:
    """Each task leaves one byte in its user's tally. ``None``: mapped users have theirs in their own homes, which root
    neither reads nor trusts.
    """
    if not os.path.isabs(answers):
        return None
    try:
        return os.stat(os.path.join(function.answers_folder({"answers": answers}), function.TALLY)).st_size
    except OSError:
        return 0


def remove(answers: str) -> None:
    """Remove this user's folder, once the endpoint is gone for good; mapped users' are their own."""
    if os.path.isabs(answers):
        shutil.rmtree(function.answers_folder({"answers": answers}), ignore_errors=True)


def users_of(site_file: Path) -> tuple[User, ...]:
    """The mapped users whose workers read ``site_file``. Parsl's are no descendants of the endpoint's process, and some
    processes write their title over their environment: one that still has it is enough.
    """
    found: dict[int, User] = {}
    for pid in own_pids(root_sees_all=True):
        try:
            owner = Path("/proc", str(pid)).stat()
        except OSError:
            continue  # it has ended
        given = environment(pid)
        if owner.st_uid not in (0, os.getuid()) and given.get(function.SITE_VARIABLE) == str(site_file):
            said = tuple((name, given[name]) for name in ("HOME", "XDG_STATE_HOME") if name in given)
            found[owner.st_uid] = User(owner.st_uid, owner.st_gid, said)
    return tuple(found.values())


def forget(answers: str, venv: Path, users: Iterable[User]) -> None:
    """Remove all kept answers: of this user, or of mapped users, as each of them (each environment has the folder).

    Raises ``ServiceError`` naming the users whose answers are still there.
    """
    words, left = f"forget(answers_folder({{'answers': {answers!r}}}))", []
    if os.path.isabs(answers):
        try:
            function.forget(function.answers_folder({"answers": answers}))
        except OSError as error:
            left.append(str(error))
    else:
        for user in users:
            try:
                ended = subprocess.run(
                    [str(venv / "bin" / "python"), "-I", "-"], input=f"{manifest.source()}\n\n{words}\n",
                    text=True, capture_output=True, timeout=_PATIENCE_S, env=dict(user.environment), cwd="/",
                    user=user.uid, group=user.gid, extra_groups=[],
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired) as error:
                left.append(f"user {user.uid} ({error})")
            else:
                if ended.returncode != 0:
                    left.append(f"user {user.uid} ({ended.stderr.strip().splitlines()[-1:]})")
    if left:
        raise ServiceError(
            f"The endpoint is stopped, but answers that it kept could not be removed: {'; '.join(left)}. They go with "
            "the next task of that user."
        )
