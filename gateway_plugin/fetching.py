"""Fetches a hub model's weights into the hub's cache: by the hub's own client, resumable, checked.

The client (2.4) begins a file anew after an interruption and compares no hashes. So files of more than ``_LARGE`` are
read here in ranges, with the client's session, into ``blobs/HASH.gateway.incomplete``: a later fetch continues it. The
rest, and the links to all files, are made by the client.

Order: small files first, large content next, links to weights last. So a snapshot with its weights is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from gateway_plugin import hub
from gateway_plugin.disk_room import room_bytes
from gateway_plugin.errors import ConfigError, NotFound, ServiceError
from gateway_plugin.hub_cache import COMMIT, commit_of, fetch_lock, lacks, mark, repository_folder
from gateway_plugin.hub_content import PARTIAL, LargeFile, read_content
from gateway_plugin.weights_choice import KINDS, chosen, quantizations

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_LARGE = 4 << 20
"""The client itself fetches files up to this size: at most so much is fetched twice."""
_AT_A_TIME = 4
"""Files at a time: one connection rarely fills a login node's line, and many are not polite there."""
_SPARE = 64 << 20
"""Free space left beside the weights."""
_LOOK_S = 0.2
_ENDS_S = 15.0
"""Longest time that a thread takes to see that it is over: the client reads for 10 s at most."""


@dataclass(frozen=True)
class RemoteFile:
    """One file on the hub."""

    path: str
    size: int
    sha256: str = ""
    """Of large files."""
    git_hash: str = ""
    """SHA-1 as git counts it: of small files."""


@dataclass(frozen=True)
class Progress:
    """How far a fetch is. ``waits``: another one of the same model runs first."""

    done_bytes: int
    total_bytes: int
    waits: bool = False


@dataclass(frozen=True)
class Fetched:
    """A finished fetch."""

    repository: str
    commit: str
    folder: Path
    """The snapshot."""
    total_bytes: int
    fetched_bytes: int
    """From the hub, by this fetch."""
    left_out: tuple[str, ...]


class Stopped(Exception):
    """The fetch was asked to stop; what is there stays, for the next one."""


def fetch(
    repository: str,
    revision: str,
    cache: Path,
    *,
    token: str | None = None,
    exclude: Iterable[str] = (),
    include: Iterable[str] = (),
    progress: Callable[[Progress], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> Fetched:
    """Fetch ``repository`` at ``revision`` (``""``: ``main``) into ``cache``; what is there already is kept.

    One fetch of a repository at a time: a second one waits, and then finds everything there.

    Args:
        exclude, include: patterns; see ``weights_choice.chosen``.
        progress: called a few times a second, by the caller's own thread.
        stop: once set, the fetch ends with ``Stopped``.

    Raises:
        ConfigError: a malformed name, or patterns that leave nothing.
        NotFound: the hub has no such repository or revision.
        ServiceError: the hub cannot be reached or refuses; disk or quota have no room, which is found before anything
            is fetched; or what came is not what the hub has.
        Stopped: ``stop`` was set.
    """
    stop = stop or threading.Event()
    with hub.asking(repository, revision):
        hub.quiet()
    info = hub.model_info(repository, revision, token)
    commit = info.sha or ""
    if not COMMIT.fullmatch(commit):
        raise ServiceError(f"The hub names no commit of {repository}.")
    files = {file.path: file for file in map(_remote, info.siblings or ())}
    taken = chosen(files, exclude, include)
    if not any(name.endswith(KINDS) for name in taken):
        raise ConfigError(
            f"{repository}: {'these patterns leave no weights' if exclude or include else 'it has no weights'}; "
            f"its files: {', '.join(sorted(files)[:8])}{', ...' if len(files) > 8 else ''}."
        )
    many = quantizations(taken)
    if len(many) > 1 and not include and not exclude:
        raise ConfigError(
            f"{repository} has {len(many)} GGUF files, of which an engine loads one: choose it, as in "
            f"--include '*{PurePosixPath(many[0]).name}'."
        )
    job = _Job(repository, commit, cache, token, tuple(files[name] for name in taken), stop)
    begun = job.total_bytes
    if not job.whole() or commit_of(cache, repository, revision) != commit:  # else it may be another user's
        with _writing(cache), job.locked(lambda: progress(Progress(job.there_bytes(), job.total_bytes, waits=True))):
            begun = job.there_bytes()
            job.demand_room()
            job.run(progress)
            job.note_ref(revision or "main")
    progress(Progress(job.total_bytes, job.total_bytes))
    left_out = tuple(sorted(set(files) - set(taken)))
    return Fetched(repository, commit, job.snapshot, job.total_bytes, max(0, job.total_bytes - begun), left_out)


class _Job:
    """One fetch. Its threads are daemons: a process that ends does not wait for the hub."""

    def __init__(
        self, repository: str, commit: str, cache: Path, token: str | None, files: tuple[RemoteFile, ...],
        stop: threading.Event,
    ) -> None:  # fmt: skip
        self._repository, self._commit, self._cache, self._token = repository, commit, cache, token
        self._files, self._asked_to_stop = files, stop
        self._halt = threading.Event()
        self._folder = repository_folder(cache, repository)
        self.snapshot = self._folder / "snapshots" / commit
        self.total_bytes = sum(file.size for file in files)
        self._arrived: dict[str, int] = {}

    @contextlib.contextmanager
    def locked(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the repository's lock, which ends with the process that holds it."""
        with fetch_lock(self._cache, self._repository) as lock:
            while not lock():
                on_wait()
                if self._asked_to_stop.wait(1.0):
                    raise Stopped
            yield

    def whole(self) -> bool:
        """Whether every file is there."""
        places = [(self.snapshot / file.path, file.size) for file in self._files]
        return all(place.is_file() and place.stat().st_size == size for place, size in places)

    def there_bytes(self) -> int:
        """Bytes that need not be fetched, of whole files and parts."""
        return sum(self._there(file) for file in self._files)

    def _there(self, file: RemoteFile) -> int:
        with contextlib.suppress(OSError):
            if (self.snapshot / file.path).stat().st_size == file.size:
                return file.size
        if not file.sha256:
            return 0
        blob = self._folder / "blobs" / file.sha256
        for path in (blob, blob.with_name(blob.name + PARTIAL)):
            with contextlib.suppress(OSError):
                return min(path.stat().st_size, file.size)
        return 0

    def demand_room(self) -> None:
        """Refuse what does not fit. Raises ``ServiceError``."""
        needed = self.total_bytes - self.there_bytes()
        if not needed:
            return
        room, limit = room_bytes(self._cache)
        if needed + _SPARE > room:
            where = f"the quota of {self._cache} leaves" if limit == "quota" else f"{self._cache} has"
            raise ServiceError(
                f"{self._repository} needs {needed / 2**30:.1f} GiB, and {where} {room / 2**30:.1f} GiB: make room "
                "('gateway models prune' removes what nothing refers to), or set weights_folder in the site file."
            )

    def run(self, progress: Callable[[Progress], None]) -> None:
        """Fetch everything that is not there."""
        if not self.snapshot.is_dir() or lacks(self.snapshot):  # else another program fetched it
            mark(self._folder, self._commit)
        for file in self._files:
            self._drop_wrong(file)
            self._arrived[file.path] = self._there(file)
        large = [file for file in self._files if file.size > _LARGE and file.sha256]
        weights = [file for file in self._files if file.path.endswith(KINDS)]
        small = [file for file in self._files if file not in large and file not in weights]
        others = [file for file in large if file not in weights]
        contents = list({file.sha256: file for file in large}.values())
        for step, work in (
            (small, self._whole), (contents, self._content), (others, self._whole), (weights, self._whole),
        ):  # fmt: skip
            self._in_threads(step, work, progress)
        if not self.whole():
            raise ServiceError(f"{self.snapshot} is not what the hub has. Remove it, and fetch it again.")

    def note_ref(self, revision: str) -> None:
        """Record the commit of a branch or tag, as the client does."""
        if COMMIT.fullmatch(revision) or ".." in revision.split("/"):
            return
        ref = self._folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        fresh = ref.with_name(f".{ref.name}.{os.getpid()}")
        fresh.write_text(self._commit, encoding="ascii")
        fresh.replace(ref)

    def _in_threads(
        self, files: Iterable[RemoteFile], work: Callable[[RemoteFile], None], progress: Callable[[Progress], None]
    ) -> None:
        waiting: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
        for file in files:
            waiting.put(file)
        failures: list[BaseException] = []

        def run() -> None:
            while not self._over():
                try:
                    file = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    work(file)
                except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
                    failures.append(error)
                    self._halt.set()

        threads = [threading.Thread(target=run, daemon=True) for _ in range(min(_AT_A_TIME, waiting.qsize()))]
        for thread in threads:
            thread.start()
        try:
            while (alive := [thread for thread in threads if thread.is_alive()]) and not self._over():
                progress(Progress(sum(self._arrived.values()), self.total_bytes))
                alive[0].join(_LOOK_S)
        except BaseException:
            self._halt.set()
            raise
        over = bool(failures) or self._over()
        for thread in threads:  # before the lock is released: two would write to one part
            thread.join(_ENDS_S if over else None)
        if failures:
            raise failures[0]
        if over:
            raise Stopped

    def _over(self) -> bool:
        return self._halt.is_set() or self._asked_to_stop.is_set()

    def _drop_wrong(self, file: RemoteFile) -> None:
        """Remove what is there with another size than on the hub (a write that failed), and links that lead nowhere."""
        link, blobs = self.snapshot / file.path, (self._folder / "blobs").resolve()
        found = [link.resolve(), link] if link.is_symlink() else [link]
        for path in (*found, blobs / file.sha256) if file.sha256 else found:
            if path.is_file() and path.stat().st_size == file.size:
                continue
            if path == link or path.parent == blobs:
                path.unlink(missing_ok=True)

    def _content(self, file: RemoteFile) -> None:
        if not (self.snapshot / file.path).is_file():
            one = LargeFile(self._repository, self._commit, file.path, file.size, file.sha256)

            def arrived(done: int) -> None:
                self._arrived[file.path] = done
                if self._over():
                    raise Stopped

            read_content(one, self._folder / "blobs" / file.sha256, self._token, arrived)

    def _whole(self, file: RemoteFile) -> None:
        """The client fetches the file, unless its content is there, and links it."""
        with hub.asking(self._repository, self._commit):
            from huggingface_hub import errors, hf_hub_download

            try:
                path = hf_hub_download(
                    self._repository, file.path, revision=self._commit, cache_dir=self._cache, token=self._token,
                    etag_timeout=hub.TIMEOUT_S, tqdm_class=_silent(),
                )  # fmt: skip
            except errors.EntryNotFoundError as error:
                if isinstance(error, errors.RemoteEntryNotFoundError):
                    raise NotFound(f"{self._repository} has no file {file.path} any more.") from None
                raise
        if file.size <= _LARGE and not _is(Path(path), file):
            Path(path).resolve().unlink(missing_ok=True)
            Path(path).unlink(missing_ok=True)
            raise ServiceError(f"{self._repository}: {file.path} came damaged. Fetch it again.")
        self._arrived[file.path] = file.size


@contextlib.contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Turn what the system refuses into one line: a folder of the cache may be another user's."""
    try:
        yield
    except OSError as error:
        raise ServiceError(
            f"{error.filename or cache} cannot be written: {error.strerror or error}. Set weights_folder in the site "
            "file to a folder of yours."
        ) from None


def _remote(said: RepoSibling) -> RemoteFile:
    sha256 = (said.lfs.sha256 or "") if said.lfs is not None else ""
    return RemoteFile(said.rfilename, said.size or 0, sha256, said.blob_id or "")


def _is(path: Path, file: RemoteFile) -> bool:
    """Whether a small file is what the hub has. Its hash is git's: of a header and the content."""
    content = path.read_bytes()
    if len(content) != file.size:
        return False
    if file.sha256:
        return hashlib.sha256(content).hexdigest() == file.sha256
    own = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return not COMMIT.fullmatch(file.git_hash) or own == file.git_hash


def _silent() -> type:
    from huggingface_hub.utils import silent_tqdm  # type: ignore[attr-defined]

    found: type = silent_tqdm
    return found
