"""Files of a multi-user endpoint: every mapped user reads them, root runs them, only root may change them."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from gateway_plugin.errors import ConfigError
from gateway_plugin.globus.endpoint.store import Options
from gateway_plugin.paths import write_private

READABLE_UMASK = 0o022
"""For new files and folders: root's own may be 077."""
_LINKS_MAX = 40
_SYSTEM_PATH = "/usr/bin:/usr/local/bin"
_PYTHONS = ("python3.14", "python3.13", "python3.12", "python3.11")


def check_user(options: Options) -> None:
    """Whether this user may have such an endpoint. Raises ``ConfigError``."""
    multi = bool(options.multi_user)
    if multi and os.getuid() != 0:
        raise ConfigError(
            "A multi-user endpoint becomes each mapped user, which needs root; or leave --multi-user out."
        )
    if multi and options.shared_folder is None:
        raise ConfigError("A multi-user endpoint needs --shared-folder, a folder that every mapped user can read.")
    if not multi and os.getuid() == 0:
        raise ConfigError("As root an endpoint must be --multi-user; configure a single-user one as an ordinary user.")


def check_files(options: Options) -> None:
    """Whether only root can change the files given to a multi-user endpoint. Raises ``ConfigError``."""
    if options.multi_user:
        for path, option in (
            (options.identity_mapping, "--identity-mapping"),
            (options.ca, "--ca"),
            (options.shared_folder, "--shared-folder"),
        ):
            if path is not None:
                check_only_root_changes(path, option)
        for program in _programs(options.identity_mapping):
            check_only_root_changes(program, "--identity-mapping")


def _programs(mapping: Path | None) -> Iterator[Path]:
    """The programs that a mapping has root run to map a caller, and files among their arguments."""
    try:
        document = json.loads(mapping.read_text(encoding="utf-8")) if mapping is not None else None
    except (OSError, ValueError):
        return  # nothing in it could be run; Globus reports what is wrong with it
    for entry in document if isinstance(document, list) else [document]:
        command = entry.get("command") if isinstance(entry, dict) else None
        for number, word in enumerate(command if isinstance(command, list) else []):
            found = shutil.which(str(word)) if number == 0 else str(word)
            if found is not None and os.path.isabs(found):
                yield Path(found)


def check_reach(path: Path) -> None:
    """Whether all users may read below the folders that lead to ``path``. Raises ``ConfigError``."""
    for folder in reversed(path.resolve().parents):
        if folder.exists() and not folder.stat().st_mode & 0o001:
            raise ConfigError(f"{folder}, on the way to {path}, lets nobody pass: mapped users need to read below it.")


def check_only_root_changes(path: Path, option: str = "--shared-folder") -> None:
    """Whether only root could put another file at ``path``: each folder on the way to it, each link there and its
    target. Parts that do not exist yet are left out. Raises ``ConfigError`` naming the part, and ``option``.
    """
    way = list(_way(path))
    for part in way:
        try:
            found = part.lstat()
        except FileNotFoundError:
            continue
        # in a sticky folder, such as /tmp, each entry is its owner's; its contents are checked separately
        _check(part, found, path, option, sticky=part != way[-1])


def check_trees(roots: Iterable[Path], path: Path, option: str) -> None:
    """Whether only root could change these folders or files, the way to them, or anything in them and in folders
    that links in them lead to. Raises ``ConfigError``: ``path`` depends on a part that others can change.
    """
    seen: set[Path] = set()
    lock = str(path.resolve() / ".lock")  # uv's, lockable by all users; nothing reads it
    todo = list(roots)
    while todo:
        root = todo.pop()
        check_only_root_changes(root, option)
        root = root.resolve()
        if seen & {root, *root.parents}:
            continue
        seen.add(root)
        for folder, folders, files in os.walk(root):
            for name in (*folders, *files):
                part = os.path.join(folder, name)  # thousands: a Path for each would cost more than the rest
                found = os.lstat(part)
                if stat.S_ISLNK(found.st_mode):
                    todo.append(Path(part))
                elif (found.st_uid != 0 or found.st_mode & 0o022) and part != lock:
                    _check(Path(part), found, path, option, sticky=False)


def _check(part: Path, found: os.stat_result, path: Path, option: str, *, sticky: bool) -> None:
    link = stat.S_ISLNK(found.st_mode)  # a link's own mode has no meaning
    writable = found.st_mode & 0o022 and not link and not (sticky and found.st_mode & stat.S_ISVTX)
    if found.st_uid == 0 and not writable:
        return
    who = f"is {_name(found.st_uid)}'s" if found.st_uid != 0 else "can be written to by its group or by everybody"
    below = "" if part == path else f", which {path} depends on,"
    raise ConfigError(
        f"{part}{below} {who}: others than root could so run code as root or as every mapped user. Give it to root "
        f"(chown root, chmod go-w), or name with {option} what only root can change, all the way up."
    )


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _way(path: Path) -> Iterator[Path]:
    """All parts that determine the file at ``path``: its parts from the root on, links, and their targets' parts."""
    at, links, todo = Path("/"), 0, list(reversed(path.absolute().parts))
    while todo:
        part = todo.pop()
        at = at.parent if part == ".." else at / part
        yield at
        if at.is_symlink():
            links += 1
            if links > _LINKS_MAX:
                raise ConfigError(f"{path} leads through more than {_LINKS_MAX} links.")
            todo += reversed(at.readlink().parts)
            at = at.parent


def make(path: Path) -> None:
    """Make the folder, 0755, with any umask. Raises ``ConfigError`` if it cannot be shared there."""
    check_only_root_changes(path)
    check_reach(path)
    before = os.umask(READABLE_UMASK)
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    finally:
        os.umask(before)
    check_only_root_changes(path)  # a new part may belong to another user by now
    path.chmod(0o755)


def copy(file: Path, target: Path) -> Path:
    """Put an authority where every mapped user reads it. Raises ``ConfigError``: others than root can change it, or it
    cannot be read.
    """
    check_only_root_changes(file, "--ca")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}).") from None
    write_private(target, content)
    target.chmod(0o644)
    return target


def check_environment(venv: Path) -> None:
    """Whether only root could change the programs of ``venv``: all of it, its base interpreter with the library, and
    folders that it takes packages from. Raises ``ConfigError``; nothing of it is run.
    """
    option = "--venv"
    check_trees([venv], venv, option)
    python = venv / "bin" / "python"
    settings = _settings(venv)
    prefixes = {python.resolve().parent.parent}
    if "home" in settings:
        prefixes.add(Path(settings["home"]).parent)
    versions = [folder.name for folder in venv.glob("lib/python3*")] or ["python3*"]
    if settings.get("include-system-site-packages", "").lower() == "true":
        versions.append("python3")  # Debian's packages, for any version
        prefixes.add(Path("/usr/local"))
    used: list[Path] = []
    for prefix in prefixes:
        check_only_root_changes(prefix, option)
        for version in versions:
            used += (*prefix.glob(f"lib*/{version}"), *prefix.glob("lib*/libpython*"))
    for file in venv.glob("lib*/python3*/site-packages/*.pth"):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.strip() and not line.startswith(("#", "import ", "import\t")):
                used.append(file.parent / line.strip())
    check_trees(used, venv, option)
    for finder in venv.glob("lib*/python3*/site-packages/__editable__*.py"):
        raise ConfigError(f"{finder} leads to code outside of {venv}: install that package there, and not editable.")


def check_program(program: Path) -> None:
    """Whether all users may run ``program`` of an environment, and only root change it. Raises ``ConfigError``."""
    for path in (program, program.parent / "python"):
        check_reach(path)
        if path.resolve().stat().st_mode & 0o005 != 0o005:
            raise ConfigError(
                f"{path} cannot be run by mapped users: remove {program.parent.parent} and configure again, "
                "or name a readable one with --venv."
            )
    check_environment(program.parent.parent)


def interpreter(own: Path) -> Path:
    """Base interpreter of an environment that root runs: ``own`` if only root can change it and all users may run it,
    else the system's. Raises ``ConfigError``.
    """
    found = (shutil.which(name, path=_SYSTEM_PATH) for name in ("python3", *_PYTHONS))
    reasons = []
    for candidate in (own, *(Path(path) for path in found if path and Path(path).resolve().name in _PYTHONS)):
        try:
            check_only_root_changes(candidate, "--venv")
            check_reach(candidate)
            return candidate
        except ConfigError as error:
            reasons.append(error.message)
    raise ConfigError(
        f"{reasons[0]} Or install the system's Python, 3.11 or newer, with its venv module: it is taken then."
    )


def _settings(venv: Path) -> dict[str, str]:
    """The settings in ``pyvenv.cfg``."""
    try:
        lines = (venv / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition("=") for line in lines)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}
