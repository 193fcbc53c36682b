"""What lies in the hub's cache: revisions with their sizes and last use, the catalog entries that refer to them, and
removal of what nothing refers to.

The hub's own cache may hold models of the user's other programs. ``fetching`` marks what it fetched
(``hub_cache.mark``): only what this user's gateway fetched is removed, unless asked otherwise.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gateway_plugin.catalog import Model
from gateway_plugin.errors import ServiceError
from gateway_plugin.hub import quiet
from gateway_plugin.hub_cache import commit_of, fetch_lock, lacks, marked, repository_folder
from gateway_plugin.weights import is_local, split_revision

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo


@dataclass(frozen=True)
class Held:
    """One revision of a model in the cache."""

    repository: str
    commit: str
    """``""``: parts of an interrupted fetch alone."""
    refs: tuple[str, ...]
    """Branches and tags that were this commit when they were fetched."""
    disk_bytes: int
    """With parts of interrupted fetches; content that two revisions share counts for both."""
    last_used: float
    """When a file of it was read last, seconds since the epoch; as exact as the file system notes it."""
    by_gateway: bool
    """The gateway fetched it here, for this user."""
    lacks: str
    """What it lacks for an engine; ``""``: nothing."""
    entries: tuple[str, ...] = ()
    """Catalog entries that refer to it."""
    fetching: bool = False
    """A fetch of this repository runs."""


def inventory(cache: Path, models: Iterable[Model] = ()) -> tuple[Held, ...]:
    """All models in ``cache``, by name. ``models``: the entries of every catalog that counts.

    Raises ``ServiceError``: the hub's client is missing.
    """
    entries = tuple(models)
    found: list[Held] = []
    scanned = {repo.repo_path.name: repo for repo in _scan(cache) if repo.repo_type == "model"}
    for folder in sorted(cache.glob("models--*--*")) if cache.is_dir() else ():
        repository = folder.name.removeprefix("models--").replace("--", "/")
        parts = [path for path in folder.glob("blobs/*.incomplete") if path.is_file()]
        part_bytes = sum(path.stat().st_size for path in parts)
        busy = _busy(cache, repository)
        repo = scanned.get(folder.name)
        ours = _ours(folder)
        if repo is None or not repo.revisions:
            used = max((path.stat().st_mtime for path in parts), default=folder.stat().st_mtime)
            bytes_ = sum(path.stat().st_size for path in folder.glob("blobs/*") if path.is_file())
            # The client reads no revision of a repository in which one is damaged: all of them would be removed.
            alone = bool(ours) and _snapshots(folder) <= ours
            found.append(Held(repository, "", (), bytes_, used, alone, "it is not whole", fetching=busy))
            continue
        for revision in sorted(repo.revisions, key=lambda one: one.commit_hash):
            used = max((file.blob_last_accessed for file in revision.files), default=revision.last_modified)
            commit, refs = revision.commit_hash, tuple(sorted(revision.refs))
            missing = lacks(revision.snapshot_path)
            bytes_ = revision.size_on_disk + part_bytes
            found.append(Held(repository, commit, refs, bytes_, used, commit in ours, missing, fetching=busy))
    return tuple(replace(held, entries=referring(held, entries, cache)) for held in found)


def referring(held: Held, models: Iterable[Model], cache: Path) -> tuple[str, ...]:
    """Names of the entries that refer to ``held``: (1) by their source, at this commit, or at a revision that is not
    known to be another one; (2) by an option or variable with the repository's name in it, such as an adapter; (3) by
    a folder in it, or a link to one.
    """
    names: list[str] = []
    inside = f"{repository_folder(cache, held.repository).resolve()}/"
    for model in models:
        repository, revision = split_revision(model.source)
        commit = commit_of(cache, repository, revision) if repository == held.repository else ""
        by_source = not is_local(model.source) and repository == held.repository and commit in ("", held.commit)  # (1)
        texts = (*model.args, *model.command, *model.env.values())
        by_text = any(held.repository in text or inside in text for text in texts)  # (2)
        folders = (*([model.source] if is_local(model.source) else []), *(model.adapters or {}).values())
        by_folder = any(f"{Path(one).expanduser().resolve()}/".startswith(inside) for one in folders)  # (3)
        if by_source or by_text or by_folder or (not held.commit and repository == held.repository):
            names.append(model.name)
    return tuple(dict.fromkeys(names))


def unused(held: Iterable[Held], *, all_programs: bool = False) -> tuple[Held, ...]:
    """Those that may be removed: nothing refers to them, no fetch needs them, and the gateway fetched them (or
    ``all_programs``). Pure."""
    return tuple(one for one in held if not one.entries and not one.fetching and (one.by_gateway or all_programs))


def remove(cache: Path, held: Iterable[Held]) -> int:
    """Remove these revisions; a repository whose fetch has begun meanwhile is left alone. Returns the bytes freed.

    Raises ``ServiceError``: something could not be removed.
    """
    by_repository: dict[str, list[Held]] = {}
    for one in held:
        by_repository.setdefault(one.repository, []).append(one)
    freed = 0
    for repository, ones in by_repository.items():
        if (folder := repository_folder(cache, repository)).is_symlink():
            raise ServiceError(f"{folder} is a link to {folder.resolve()}: remove it there, or remove the link.")
        with fetch_lock(cache, repository) as lock:
            if lock():
                freed += _remove(cache, repository, ones)
    return freed


def _remove(cache: Path, repository: str, ones: Iterable[Held]) -> int:
    folder = repository_folder(cache, repository)
    commits = {one.commit for one in ones if one.commit}
    freed = 0
    try:
        if not commits:  # parts alone
            freed = sum(one.disk_bytes for one in ones)
            shutil.rmtree(folder)
            return freed
        for repo in _scan(cache):
            if repo.repo_path.name == folder.name:
                freed = _delete(cache, repo, commits)
        left = [path.name for path in (folder / "snapshots").glob("*") if path.name in commits]
    except OSError as error:
        raise ServiceError(f"{error.filename or folder} cannot be removed: {error.strerror}.") from None
    for commit in commits:
        (folder / ".gateway" / commit).unlink(missing_ok=True)
    if left:
        raise ServiceError(f"{folder / 'snapshots' / left[0]} could not be removed: look at its mode and its owner.")
    return freed


def _delete(cache: Path, repo: CachedRepoInfo, commits: set[str]) -> int:
    """Delete revisions of one repository: the client would find a commit in copies of it, too."""
    from huggingface_hub import scan_cache_dir

    found = replace(scan_cache_dir(cache), repos=frozenset({repo}))
    strategy = found.delete_revisions(*sorted(commits))
    strategy.execute()
    return strategy.expected_freed_size


def _ours(folder: Path) -> frozenset[str]:
    """The commits in a repository's folder that are this user's to remove: a colleague's gateway may use the same
    cache, or a link lead to a colleague's."""
    if folder.is_symlink():
        return frozenset()
    return frozenset(name for name in marked(folder) if (folder / ".gateway" / name).stat().st_uid == os.getuid())


def _snapshots(folder: Path) -> set[str]:
    return {path.name for path in (folder / "snapshots").glob("*") if path.is_dir()}


def _scan(cache: Path) -> tuple[CachedRepoInfo, ...]:
    try:
        from huggingface_hub import scan_cache_dir
    except ImportError:
        raise ServiceError("The hub's client is missing. Run: pip install 'gateway-plugin[serve]'") from None
    quiet()
    if not cache.is_dir():
        return ()
    try:
        return tuple(scan_cache_dir(cache).repos)
    except OSError as error:
        raise ServiceError(f"{cache} cannot be read: {error.strerror}.") from None


def _busy(cache: Path, repository: str) -> bool:
    lock = cache / ".locks" / repository_folder(cache, repository).name / "gateway-fetch.lock"
    if not lock.exists():
        return False
    try:
        with fetch_lock(cache, repository) as take:
            return not take()
    except ServiceError:  # another user's cache, which is listed all the same
        return False
