"""Ownership of folders: nothing is read from one that another user made, can write to, or can replace.

The rule is that of OpenSSH's ``StrictModes``, extended by links: the folder is a real one (no link), of this user, and
not writable by others; every folder above it is root's or this user's and not writable by others, unless it has the
sticky bit, under which users cannot rename each other's files. A link above it is accepted if it is root's or this
user's and leads to a place under the same rule. A group in which the user is alone (the user's private group, under
which many systems set the umask to 002) counts as the user.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from functools import cache
from pathlib import Path

from gateway_plugin.errors import ServiceError

_LINKS = 40
"""Links followed on the way to a folder, as the kernel has it (``ELOOP``)."""


def problem_with(path: Path) -> str | None:
    """Why ``path`` cannot be trusted, as a message; ``None`` if it can, or if it does not exist yet.

    Of a path that does not exist, the existing part is checked: it decides which users may create the rest.
    """
    above = replaceable(path)
    if above is not None:
        return above
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"{path} cannot be inspected: {error.strerror}"
    if stat.S_ISLNK(found.st_mode):
        return f"{path} is a link, not a folder of this user"
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return f"{path} is not a folder of this user (owner: uid {found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):  # even a group of the user's own: the gateway makes it 0700
        mode = f"{stat.S_IMODE(found.st_mode):o}"
        return f"{path} can be written to by others (mode {mode}); 'chmod go-w' it if all that is in it is yours"
    return None


def replaceable(path: Path) -> str | None:
    """Why a user other than root could replace ``path``; ``None`` if none could."""
    return _problem_above(path, _LINKS)


def demand_own(path: Path) -> Path:
    """``path``, if it can be trusted or does not exist. Raises ``ServiceError`` with what to do."""
    problem = problem_with(path)
    if problem is not None:
        raise ServiceError(
            f"{problem}. Nothing in it was read; set another place (GATEWAY_STATE or --state, GATEWAY_RUN_ROOT)."
        )
    return path


def private_folder(path: Path) -> Path:
    """Make ``path``, and missing folders above it, 0700 and of this user, with any umask.

    Raises:
        ServiceError: it, or a folder above it, is another user's or can be changed by one, or it is a link.
    """
    demand_own(path)
    for folder in (*reversed(path.parents), path):
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            continue
        except OSError as error:
            if folder.is_dir():
                continue  # a read-only or automounted place may report EROFS or EACCES although the folder exists
            raise ServiceError(f"{folder} cannot be made: {error.strerror}.") from None
    demand_own(path)  # another user may have been faster
    if stat.S_IMODE(path.lstat().st_mode) != 0o700:
        path.chmod(0o700)
    return path


def first_own(candidates: tuple[Path, ...]) -> Path:
    """Which of several names for one folder is in use: the first that exists and can be trusted, else the first free.

    A name taken by another user is skipped; so is one that was freed while a later one was in use. If every name is
    taken, the first is returned, for ``private_folder`` to refuse with the reason.
    """
    usable = [path for path in candidates if problem_with(path) is None]
    return next((path for path in usable if path.is_dir()), (usable or list(candidates))[0])


def _problem_above(path: Path, links: int) -> str | None:
    for folder in reversed(path.parents):
        try:
            found = folder.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return f"{folder} cannot be inspected: {error.strerror}"
        if found.st_uid not in (0, os.getuid(), _unmapped_owner()):
            return f"{folder} belongs to another user (uid {found.st_uid}), who can replace {path}"
        if stat.S_ISLNK(found.st_mode):
            if links == 0:
                return f"{folder}: too many links"
            target = folder.parent / os.readlink(folder)
            problem = _problem_above(target / "entry", links - 1)
        elif others_write(found) and not found.st_mode & stat.S_ISVTX:
            return (
                f"{folder} can be written to by others (mode {stat.S_IMODE(found.st_mode):o}), who can replace {path}"
            )
        else:
            problem = None
        if problem is not None:
            return problem
    return None


@cache
def _unmapped_owner() -> int | None:
    """The uid of all users outside this process's user namespace, as in most containers; ``None``: there are none.

    Above a folder of this user it counts as root's: the machine's root cannot be distinguished from its other users
    there.
    """
    try:
        mapping = Path("/proc/self/uid_map").read_text(encoding="ascii").split()
        if mapping == ["0", "0", str(2**32 - 1)]:
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
    except OSError:
        return None  # not Linux: there are no such namespaces


def others_write(found: os.stat_result) -> bool:
    """Whether the mode lets users other than the owner write. The user's private group does not count."""
    if found.st_mode & stat.S_IWOTH:
        return True
    return bool(found.st_mode & stat.S_IWGRP) and not _private_group(found.st_gid)


def _private_group(gid: int) -> bool:
    """Whether only this user is in the group: the primary one, named as the user, without other members."""
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
