"""Where a hub model's weights lie in the hub's cache, and whether they are whole. Without the hub's client: nodes look.

The layout is the client's own (huggingface.co/docs/huggingface_hub/guides/manage-cache), so that weights which other
programs fetched are used as they are:

    models--ORG--NAME/refs/REVISION          a commit, for a branch or tag
    models--ORG--NAME/snapshots/COMMIT/FILE  links to ../../blobs/HASH
    models--ORG--NAME/blobs/HASH             content; HASH.*incomplete: part of it
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from gateway_plugin.errors import ServiceError

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHORT_COMMIT = re.compile(r"[0-9a-f]{7,39}")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_INDEX_MAX = 64 << 20
_FILES_MAX = 20_000


def repository_folder(cache: Path, repository: str) -> Path:
    """The folder of ``org/name`` in the cache."""
    return cache / f"models--{repository.replace('/', '--')}"


def commit_of(cache: Path, repository: str, revision: str = "") -> str:
    """The commit that ``revision`` (``""``: ``main``) was when it was fetched last; ``""``: it never was."""
    folder = repository_folder(cache, repository)
    name = revision or "main"
    if COMMIT.fullmatch(name):
        return name
    if ".." not in name.split("/"):
        try:
            found = (folder / "refs" / name).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            found = ""
        if COMMIT.fullmatch(found):
            return found
    if _SHORT_COMMIT.fullmatch(name):
        there = [path.name for path in (folder / "snapshots").glob(f"{name}*") if COMMIT.fullmatch(path.name)]
        return there[0] if len(there) == 1 else ""
    return ""


def snapshot(cache: Path, repository: str, revision: str = "") -> Path | None:
    """The folder with the files of this revision, whole or not; ``None``: there is none."""
    commit = commit_of(cache, repository, revision)
    folder = repository_folder(cache, repository) / "snapshots" / commit
    return folder if commit and folder.is_dir() else None


def lacks(folder: Path) -> str:
    """What a snapshot lacks for an engine to load it; ``""``: nothing.

    ``fetching`` places weights last: of an interrupted fetch the weights are missing, or files that an index names.
    """
    names: set[str] = set()
    for path in folder.rglob("*"):
        if len(names) > _FILES_MAX:
            return f"{folder} has too many files to be a model"
        if path.is_symlink() and not path.exists():
            return f"the content of {path.name} is gone"
        names.add(path.relative_to(folder).as_posix())
    if not any(name.endswith(_WEIGHTS) for name in names):
        return "there are no weights in it"
    for name in sorted(name for name in names if name.endswith((".safetensors.index.json", ".bin.index.json"))):
        parts = indexed(folder / name)
        if parts is None:
            return f"{name} cannot be read"
        place = PurePosixPath(name).parent
        absent = sorted(part for part in parts if (place / part).as_posix() not in names)
        if len(absent) == len(parts) and any(one.endswith(_WEIGHTS) and one not in parts for one in names):
            continue  # the index of a second copy, which was left out
        if absent:
            return f"{len(absent)} of the {len(parts)} files of {name} are missing"
    return ""


def indexed(index: Path) -> set[str] | None:
    """The files that an index of weights names; ``None``: it cannot be read."""
    try:
        with index.open("rb") as stream:
            found = json.loads(stream.read(_INDEX_MAX))["weight_map"]
        return {str(part) for part in found.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def mark(folder: Path, commit: str) -> None:
    """Note in a repository's folder that the gateway fetches this commit. Raises ``OSError``."""
    (folder / ".gateway").mkdir(parents=True, exist_ok=True)
    note = folder / ".gateway" / commit
    if not note.exists():  # another user's would refuse to be touched
        note.touch()


def marked(folder: Path) -> frozenset[str]:
    """The commits in a repository's folder that the gateway fetched."""
    return frozenset(path.name for path in (folder / ".gateway").glob("*"))


def cache_of(source: str) -> Path | None:
    """The cache in which a snapshot, or a file of one, lies; ``None``: it lies in none."""
    folder = _repository_of(Path(source))
    return None if folder is None else folder.parent


def shown_for(source: str) -> Path:
    """The folder that an engine must be able to read to load ``source``, a folder or a file: of a snapshot its whole
    repository, since its files are links to content beside it."""
    return _repository_of(Path(source)) or Path(source)


def _repository_of(path: Path) -> Path | None:
    for folder in (path, *path.parents):
        if COMMIT.fullmatch(folder.name) and folder.parent.name == "snapshots":
            return folder.parent.parent
    return None


@contextlib.contextmanager
def fetch_lock(cache: Path, repository: str) -> Iterator[Callable[[], bool]]:
    """A function that tries to take the lock of a repository's fetch. It is released at the end.

    Raises ``ServiceError``: the cache cannot be written to.
    """
    path = cache / ".locks" / repository_folder(cache, repository).name / "gateway-fetch.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ServiceError(
            f"{path} cannot be written: {error.strerror}. Set weights_folder in the site file to a folder of yours."
        ) from None

    def take() -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: hashes still tell what two fetches at once would spoil
            return True
        return True

    try:
        yield take
    finally:
        os.close(handle)
