"""An engine's runtime on this node: looks whether it is there, gathers what its command line depends on, makes its
folders, and tells whether bubblewrap hides the gateway's folders from it or the container does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from gateway_plugin.catalog import Model
from gateway_plugin.engine_records import ENGINE_MARK, clear_away
from gateway_plugin.errors import GatewayError, ServiceError
from gateway_plugin.hub_cache import shown_for
from gateway_plugin.isolation import Isolation, isolated
from gateway_plugin.ownership import private_folder
from gateway_plugin.paths import Layout, runtime_home
from gateway_plugin.runtimes import Container, Runtime
from gateway_plugin.runtimes.containers import HIDING, PROGRAMS, Facts, Gpu, Start, inner_env, named_paths
from gateway_plugin.runtimes.start import in_runtime
from gateway_plugin.runtimes.versions import Seen, Tried, argv_of, seen
from gateway_plugin.weights import is_local

logger = logging.getLogger(__name__)

_TMP = "/tmp/"  # noqa: S108 - the container's own
_BY_PATH = frozenset({"apptainer", "singularity"})
"""Kinds whose image is a file or folder."""


def start_in_runtime(
    argv: tuple[str, ...],
    env: Mapping[str, str],
    model: Model,
    layout: Layout,
    log: Path,
    files: Iterable[Path],
    source: str,
    gpus: int,
    sockets: Iterable[Path] = (),
) -> Start:
    """How ``argv`` is started in ``model``'s runtime; its folders and files are made.

    Args:
        log: its log; its name is the engine's.
        files: what it must see: those of TLS.
        source: where its weights are: a folder, or the name of a repository of a hub.
        gpus: how many it gets.
        sockets: folders of the sockets that it listens on.

    Raises:
        ServiceError: the runtime is not there on this node.
        OSError: a folder cannot be made.
    """
    with_all = {**env, ENGINE_MARK: str(log)}
    runtime = model.runtime
    if runtime is None:
        return Start(argv, with_all, written=tuple(map(str, sockets)))
    if problem := missing(runtime, with_all):
        raise ServiceError(f"runtime '{runtime.name}': {problem}")
    if runtime.container is not None and not is_local(source) and not {"HF_HOME", "HF_HUB_CACHE"} & set(with_all):
        hub = Path.home() / ".cache" / "huggingface"
        hub.mkdir(parents=True, exist_ok=True)
        with_all["HF_HOME"] = str(hub)  # in its own home it would fetch the weights again
    local = [folder for folder in (source, *(model.adapters or {}).values()) if folder.startswith("/")]
    read = (*map(str, files), *_cache(source, with_all), *(str(shown_for(folder)) for folder in local))
    return made(argv, with_all, model.variables, runtime, layout, log.stem, read, gpus, tuple(map(str, sockets)))


def made(
    argv: tuple[str, ...],
    env: Mapping[str, str],
    own: Mapping[str, str],
    runtime: Runtime,
    layout: Layout,
    name: str,
    read: tuple[str, ...] = (),
    gpus: int = 0,
    written: tuple[str, ...] = (),
) -> Start:
    """How ``argv`` is started in ``runtime`` under ``name``; its folders and files are made. Arguments as for
    ``start.in_runtime``. Raises ``OSError``."""
    facts = _facts(argv, env, own, runtime, layout, name, read, gpus, written)
    start = in_runtime(argv, env, own, runtime, facts)
    if runtime.container is not None:
        private_folder(Path(facts.home))
        _mount_points(private_folder(Path(facts.scratch)), (*start.read, *start.written))
    for file, text in start.files.items():
        Path(file).write_text(text, encoding="utf-8")
    return start


def missing(runtime: Runtime, env: Mapping[str, str]) -> str:
    """What of ``runtime`` is not there, as far as it shows without a start; ``""``: nothing."""
    container = runtime.container
    if container is None:
        python = runtime.python
        if python.startswith("/") and not os.access(python, os.X_OK):
            return f"there is no Python {python} on this node"
        return ""
    program = PROGRAMS[container.kind]
    if not runtime.modules and shutil.which(program, path=env.get("PATH", os.defpath)) is None:
        return f"there is no {program} on PATH on this node"
    image = container.image
    if (image.startswith("/") or container.kind in _BY_PATH) and not os.path.exists(image):
        return f"there is no image {image} on this node"
    for place in (bind.partition(":")[0] for bind in container.binds):
        if not os.path.exists(place):
            return f"there is no {place} on this node (binds)"
    return ""


def confined(
    found: Isolation, wanted: str, model: Model, layout: Layout, source: str, start: Start, alone: bool = False
) -> tuple[str, ...]:
    """The arguments of bubblewrap before ``start``'s command line; ``()`` where there is none around it: the container
    itself hides the gateway's folders, or nothing does. ``alone``: as for ``isolation.isolated``.

    Raises:
        ServiceError: the site requires isolation, and it is not available.
    """
    container = None if model.runtime is None else model.runtime.container
    if container is not None and container.kind in HIDING and model.isolated:
        shown = _shown(container, layout)
        if not shown or wanted == "off":
            return ()
        found = Isolation(reason=f"its container has {shown}, where the gateway's secrets are")
    elif container is not None and container.kind == "shifter":
        found = Isolation(reason="Shifter does not run inside bubblewrap, and shows home folders")
    elif container is not None and container.kind == "charliecloud" and os.getuid() == 0:
        found = Isolation(reason="Charliecloud does not run inside bubblewrap as root")
    if wanted == "auto" and model.isolated and not found.program:
        logger.warning("engine not isolated model=%s why=%s", model.name, found.reason)
    return isolated(found, wanted, model, layout, source, start.env, start.read, start.written, alone)


def _shown(container: Container, layout: Layout) -> str:
    """The bind that shows the gateway's secrets; ``""``: none does."""
    hidden = (layout.state.resolve(), layout.run.resolve())
    for bind in container.binds:
        place = Path(bind.partition(":")[0]).resolve()
        if any(folder.is_relative_to(place) or place.is_relative_to(folder) for folder in hidden):
            return bind
    return ""


def _facts(
    argv: tuple[str, ...],
    env: Mapping[str, str],
    own: Mapping[str, str],
    runtime: Runtime,
    layout: Layout,
    name: str,
    read: tuple[str, ...],
    gpus: int,
    written: tuple[str, ...],
) -> Facts:
    container, home = runtime.container, runtime_home(runtime.name)
    python = Path(runtime.python)
    conda = bool(runtime.python) and (python.parent.parent / "conda-meta").is_dir()
    if container is None:
        return Facts(name, str(home), "", written=written, conda=conda)
    inner = inner_env(env, own)
    hidden = (layout.state, layout.run, Path.home())
    named = [
        path
        for path in named_paths(argv, inner)
        if not any(secret.is_relative_to(path) or Path(path).is_relative_to(secret) for secret in hidden[:2])
        and not hidden[2].is_relative_to(path)
    ]
    files = frozenset(path for path in named if os.path.isfile(path))
    folders = frozenset(path for path in named if os.path.isdir(path))
    image = Path(container.image)
    paths: tuple[str, ...] = ()
    if container.kind == "charliecloud" and image.is_dir():
        paths = (str(home), *read, *written, *files, *folders, *(bind for bind in container.binds if ":" not in bind))
    return Facts(
        engine=f"{layout.run.name}-{name}",
        home=str(home),
        scratch=str(layout.scratch / name),
        read=read,
        written=written,
        files=files,
        folders=folders,
        gpu=_maker() if gpus else "",
        user=env.get("USER") or env.get("LOGNAME") or str(os.getuid()),
        conda=conda,
        in_image=frozenset(path for path in paths if path.startswith(_TMP) or (image / path.lstrip("/")).exists()),
        empty_in_image=frozenset(above for path in paths for above in _empty_above(image, path)),
        image_environment=bool(paths) and (image / "ch/environment").is_file(),
    )


def _cache(source: str, env: Mapping[str, str]) -> tuple[str, ...]:
    """The cache in which fetched weights lie, if ``env`` names it: to be read only, as they are."""
    cache = env.get("HF_HUB_CACHE", "")
    return (cache,) if cache and Path(source).is_relative_to(cache) else ()


def _empty_above(image: Path, path: str) -> Iterable[str]:
    for parent in Path(path).parents:
        inside = image / str(parent).lstrip("/")
        if parent != Path("/") and inside.is_dir() and not any(inside.iterdir()):
            yield str(parent)


def _mount_points(scratch: Path, paths: Iterable[str]) -> None:
    """Mount points for what is bound below ``/tmp``, where ``scratch`` is."""
    for path in paths:
        if path.startswith(_TMP) and not Path(path).is_relative_to(scratch):
            point = scratch / path.removeprefix(_TMP)
            (point if os.path.isdir(path) else point.parent).mkdir(parents=True, exist_ok=True)
            if not os.path.isdir(path):
                point.touch()


def _maker() -> Gpu:
    """Who made this node's GPUs, by their drivers' devices."""
    if os.path.exists("/dev/nvidiactl"):
        return "nvidia"
    return "amd" if os.path.exists("/dev/kfd") else ""


def look(tried: Tried, layout: Layout, environ: Mapping[str, str], timeout_s: float) -> Seen:
    """Start ``tried``'s runtime here for its versions. What is not there, or takes longer, is its ``problem``."""
    runtime = tried.runtime
    if problem := missing(runtime, environ):
        return Seen(problem=problem)
    # Unique: of two trials on one node, or of two node types' jobs on it, each has its container.
    name = f"look-{runtime.name or 'own'}-{secrets.token_hex(4)}"
    argv, env = argv_of(tried, sys.executable), {**environ, **runtime.env}
    start = Start(argv, env)
    try:
        if runtime.name:
            start = made(argv, env, runtime.env, runtime, layout, name, gpus=tried.gpus)
        code, output, complaint = _ended(start, timeout_s)
    except subprocess.TimeoutExpired:
        return Seen(problem=f"it did not start within {timeout_s:.0f} s")
    except (GatewayError, OSError) as error:
        return Seen(problem=error.message if isinstance(error, GatewayError) else str(error))
    finally:
        clear_away(start.remove, start.scratch)
        if start.scratch:
            for folder in (layout.scratch, layout.run):
                with contextlib.suppress(OSError):  # a gateway's, or another runtime's
                    folder.rmdir()
    return seen(tried, code, output, complaint)


def _ended(start: Start, timeout_s: float) -> tuple[int, str, str]:
    """Exit code and output. Raises ``OSError``, or ``TimeoutExpired``: its process group was killed."""
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        start.argv, env=start.env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True
    )
    try:
        output, complaint = child.communicate(timeout=timeout_s)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for stream in (child.stdout, child.stderr):  # not read to their end: a container's monitor may hold them
            if stream is not None:
                stream.close()
        raise
    return child.returncode, output.decode(errors="replace"), complaint.decode(errors="replace")
