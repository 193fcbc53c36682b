"""An engine's command line and environment in a container of each kind: pure.

An engine keeps its command line: weights, TLS files, caches and the folders that its arguments name are bound at their
own paths. It sees nothing else of the node but its GPUs, ``Container.binds`` and what the site mounts into every
container. Values of variables, secrets among them, go in by the environment; only ``HOME``, ``TMPDIR`` and ``PATH``
stand in a command line.

Sources: apptainer.org/docs/user/main (exec, GPU support, environment); docs.podman.io, podman-run(1) and podman-rm(1);
github.com/NERSC/podman-hpc; ch-run(1) of Charliecloud; github.com/NVIDIA/enroot, doc/cmd/start.md, and its hooks;
docs.nersc.gov/development/containers/shifter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal, get_args

from gateway_plugin.masking import speaks_of_a_secret
from gateway_plugin.runtimes import Container, ContainerKind

Gpu = Literal["", "nvidia", "amd"]

PROGRAMS: dict[str, str] = {**{kind: kind for kind in get_args(ContainerKind)}, "charliecloud": "ch-run"}
"""The program of each kind."""
HIDING = frozenset({"apptainer", "singularity", "podman", "podman-hpc", "enroot"})
"""Kinds in which an engine sees only what is bound: they hide the gateway's folders without bubblewrap. Inside it most
do not run, because they are setuid or call a program that is."""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_OF_THE_NODE = re.compile(
    r"PATH|LD_\w+|PYTHON(PATH|HOME|STARTUP|USERBASE|NOUSERSITE)|VIRTUAL_ENV\w*|_?CONDA\w*|MANPATH|INFOPATH"
    r"|(__)?MODULES\w*|MODULEPATH\w*|MODULE_VERSION\w*|LOADEDMODULES|_*LMOD\w*|_LMFILES_\w*|_ModuleTable\w*"
    r"|BASH\w*|ENV|HOME|USER|LOGNAME|SHELL|MAIL|HOSTNAME|TMP|TEMP|TMPDIR|XDG_(RUNTIME_DIR|\w+_DIRS|SESSION\w*)"
    r"|PKG_CONFIG_PATH|CMAKE_PREFIX_PATH|CPATH|(C|CPLUS)_INCLUDE_PATH|LIBRARY_PATH"
    r"|(APPTAINER|SINGULARITY|PODMAN|PODMANHPC|ENROOT|SHIFTER)(ENV)?_\w+"
)
"""Variables that describe the software of the node; a container has its own."""
GATEWAYS_PYTHON = re.compile(r"PYTHON(PATH|HOME|STARTUP|USERBASE)|VIRTUAL_ENV\w*|CONDA_(PREFIX|DEFAULT_ENV)\w*")
"""Variables that would lead another Python to the gateway's packages."""
_FOR_MODULES = re.compile(r"PATH|MODULE\w*|LOADEDMODULES|LMOD\w*|_*LMOD\w*|_LMFILES_\w*|_ModuleTable\w*|BASH_FUNC_.*")
_OF_THE_IMAGE = frozenset(
    PurePosixPath(name)
    for name in ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/opt", "/proc", "/run", "/sbin", "/sys", "/usr")
)
_GROWS = re.compile(r"-w|--write|-W|--write-fake.*")
"""With these of its arguments ``ch-run`` makes the mount points that an image lacks."""


@dataclass(frozen=True)
class Facts:
    """What an engine's node adds."""

    engine: str
    """Its name: unique on this node, of letters, digits, ``.``, ``-`` and ``_``."""
    home: str
    """A folder of the node that is its home in a container, and keeps its caches."""
    scratch: str
    """A folder of the node that is its ``/tmp`` in a container."""
    read: tuple[str, ...] = ()
    """Files and folders that it must see: TLS files, weights."""
    written: tuple[str, ...] = ()
    """Folders that it must see and writes: that of its socket."""
    files: frozenset[str] = frozenset()
    """Of ``named_paths``, the files of this node."""
    folders: frozenset[str] = frozenset()
    """Of ``named_paths``, the folders of this node."""
    gpu: Gpu = ""
    """Maker of the GPUs that it gets."""
    user: str = "nobody"
    conda: bool = False
    """Its runtime's Python is conda's."""
    in_image: frozenset[str] = frozenset()
    """Charliecloud: of the paths to bind, those that are in the image's folder."""
    empty_in_image: frozenset[str] = frozenset()
    """Charliecloud: the image's empty folders, as seen inside: mount points."""
    image_environment: bool = False
    """Charliecloud: the image has ``/ch/environment``."""


@dataclass(frozen=True)
class Start:
    """How an engine is started in its runtime."""

    argv: tuple[str, ...]
    env: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)
    """Files that must be there before, and what they contain."""
    remove: tuple[str, ...] = ()
    """The command that removes the container once the process group is gone; ``()``: it is gone with the group."""
    read: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    """With ``read``: paths that a bubblewrap around it must not hide."""
    scratch: str = ""
    """Its temporary folder, to be removed at its end."""


def in_container(
    argv: tuple[str, ...], env: Mapping[str, str], own: Mapping[str, str], container: Container, facts: Facts
) -> Start:
    """The command line and environment that start ``argv`` in ``container``.

    Args:
        env: the engine's environment outside.
        own: the variables of its entry and runtime: they reach it under any name.
    """
    inner = inner_env(env, own)
    if facts.gpu == "nvidia":
        inner.setdefault("NVIDIA_VISIBLE_DEVICES", "all")  # of these CUDA_VISIBLE_DEVICES chooses
        inner.setdefault("NVIDIA_DRIVER_CAPABILITIES", "compute,utility")
    named = [path for path in named_paths(argv, inner) if not _within(path, (*facts.read, *facts.written))]
    read = dict.fromkeys((*facts.read, *(path for path in named if path in facts.files)))
    folders = (path for path in named if path in facts.folders and path != facts.home)
    written = dict.fromkeys((*facts.written, *folders))
    outer = {name: value for name, value in env.items() if not GATEWAYS_PYTHON.fullmatch(name)}
    start = _BUILDERS[container.kind](argv, _Inside(outer, inner, own, tuple(read), tuple(written), container, facts))
    seen = (*read, container.image, *(bind.partition(":")[0] for bind in container.binds))
    return Start(
        start.argv,
        start.env,
        start.files,
        start.remove,
        tuple(path for path in seen if path.startswith("/")),
        (facts.home, facts.scratch, *written),
        facts.scratch,
    )


def inner_env(env: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The variables of ``env`` that reach an engine in a container: all but those that describe the node's software,
    unless they are ``own``."""
    return {
        name: value
        for name, value in env.items()
        if name in own or (re.fullmatch(r"[A-Za-z_]\w*", name) and not _OF_THE_NODE.fullmatch(name))
    }


def named_paths(argv: Iterable[str], env: Mapping[str, str]) -> tuple[str, ...]:
    """Absolute paths that are arguments (but the program), behind ``=`` in one, or values of variables; without those
    of the system's own folders, which an image has itself."""
    words = [part for word in tuple(argv)[1:] for part in (word, word.partition("=")[2])]
    return tuple(dict.fromkeys(word for word in (*words, *env.values()) if _bindable(word)))


def _bindable(word: str) -> bool:
    if not re.fullmatch(r"/[^/:,\s][^:,\s]*", word):
        return False
    path = PurePosixPath(word)
    return ".." not in path.parts and not ({path, *path.parents} & _OF_THE_IMAGE)


def _within(path: str, folders: Iterable[str]) -> bool:
    place = PurePosixPath(path)
    return any(folder in (path, *map(str, place.parents)) for folder in folders)


def _for_the_engine_alone(name: str) -> bool:
    """Whether a variable would change the container's program, and may stand in its command line."""
    return _OF_THE_NODE.fullmatch(name) is not None and not speaks_of_a_secret(name)


@dataclass(frozen=True)
class _Inside:
    env: Mapping[str, str]
    """Of the container's program."""
    inner: Mapping[str, str]
    """Of the engine, without ``HOME`` and ``TMPDIR``."""
    own: Mapping[str, str]
    read: tuple[str, ...]
    written: tuple[str, ...]
    container: Container
    facts: Facts

    def binds(self, option: str, read_only: str = "") -> list[str]:
        """The arguments that bind everything but the home folder: ``option PATH:PATH``, ``read_only`` behind some."""
        places = [(f"{self.facts.scratch}:/tmp", "")]
        places += [(f"{path}:{path}", read_only) for path in self.read]
        places += [(f"{path}:{path}", "") for path in self.written]
        places += [(bind if ":" in bind else f"{bind}:{bind}", "") for bind in self.container.binds]
        return [word for place, suffix in places for word in (option, place + suffix)]

    def by_name(self) -> list[str]:
        """``--env NAME`` for each variable: the program takes the value from its own environment. An entry's
        ``PYTHONPATH`` and the like are for the engine alone: with their values, but for secrets."""
        inner = self.inner.items()
        said = (f"{name}={value}" if _for_the_engine_alone(name) else name for name, value in inner)
        return [word for variable in said for word in ("--env", variable)]

    def outer(self) -> dict[str, str]:
        """The environment of the container's program, with the values of ``by_name``."""
        return {**self.env, **{name: value for name, value in self.inner.items() if not _for_the_engine_alone(name)}}

    def homes(self) -> list[str]:
        return ["--env", f"HOME={self.facts.home}", "--env", "TMPDIR=/tmp"]


def _apptainer(argv: tuple[str, ...], inside: _Inside) -> Start:
    container, facts = inside.container, inside.facts
    prefix = container.kind.upper()
    words = [
        *(PROGRAMS[container.kind], "exec", "--cleanenv", "--no-mount", "tmp,cwd"),
        *("--home", facts.home, "--pwd", facts.home),
        *{"nvidia": ["--nv"], "amd": ["--rocm"], "": []}[facts.gpu],
        *inside.binds("--bind", ":ro"),
    ]
    passed = {f"{prefix}ENV_{name}": value for name, value in {**inside.inner, "TMPDIR": "/tmp"}.items()}  # noqa: S108
    env = {**inside.env, **passed, f"{prefix}_NO_EVAL": "1"}  # else it evaluates values as a shell does
    return Start((*words, *container.args, container.image, *argv), env)


def _podman(argv: tuple[str, ...], inside: _Inside) -> Start:
    container, facts, hpc = inside.container, inside.facts, inside.container.kind == "podman-hpc"
    name = f"gateway-{facts.engine}"
    # In the control group of the batch job, not in one of systemd's: what ends the job ends it. podman-hpc does so.
    program = [PROGRAMS[container.kind], *(() if hpc else ("--cgroup-manager=cgroupfs",))]
    words = [
        *(*program, "run", "--rm", "--replace", "--name", name, "--pull=never"),
        *("--network=host", "--ipc=host", "--security-opt=label=disable", "--workdir", facts.home, "--entrypoint="),
        *("--volume", f"{facts.home}:{facts.home}"),
    ]
    if facts.gpu == "nvidia":
        words += ["--gpu"] if hpc else ["--device", "nvidia.com/gpu=all"]
    elif facts.gpu == "amd":
        words += ["--device", "/dev/kfd", "--device", "/dev/dri", "--group-add", "keep-groups"]
    words += [*inside.binds("--volume", ":ro"), *inside.homes(), *inside.by_name()]
    remove = (*program, "rm", "--force", "--ignore", "--time=0", name)
    return Start((*words, *container.args, container.image, *argv), inside.outer(), remove=remove)


def _enroot(argv: tuple[str, ...], inside: _Inside) -> Start:
    container, facts = inside.container, inside.facts
    script = f"{facts.scratch}/rc"  # an image's own would take the command line for its arguments
    words = [
        *(PROGRAMS["enroot"], "start", "--rc", script, "--mount", f"{facts.home}:{facts.home}"),
        *(*inside.binds("--mount"), *inside.homes(), *inside.by_name()),
    ]
    return Start((*words, *container.args, container.image, *argv), inside.outer(), files={script: 'exec "$@"\n'})


def _shifter(argv: tuple[str, ...], inside: _Inside) -> Start:
    """The site mounts home and shared file systems at their own paths into each container: nothing more is bound."""
    container = inside.container
    words = [PROGRAMS["shifter"], f"--image={container.image}"]
    words += ["--module=gpu"] if inside.facts.gpu == "nvidia" else []
    words += [f"--volume={bind if ':' in bind else f'{bind}:{bind}'}" for bind in container.binds]
    of_node = {name: inside.env[name] for name in ("HOME", "USER", "PATH") if name in inside.env}
    return Start((*words, *container.args, *argv), {**of_node, **inside.inner})


def _charliecloud(argv: tuple[str, ...], inside: _Inside) -> Start:
    container, facts = inside.container, inside.facts
    words = [PROGRAMS["charliecloud"], "--cd", facts.home]
    words += [f"--unset-env={name}" for name in ("LD_LIBRARY_PATH", "LD_PRELOAD") if name not in inside.own]
    if "PATH" not in inside.own:
        words += ["--set-env" if facts.image_environment else f"--set-env=PATH={_PATH}"]
    words += [f"--set-env=HOME={facts.home}", "--set-env=TMPDIR=/tmp", "--bind", f"{facts.scratch}:/tmp"]
    grows = any(_GROWS.fullmatch(word) for word in container.args)
    paths = (facts.home, *inside.read, *inside.written)
    places = dict.fromkeys(path if grows else _mount_point(path, facts) for path in paths)
    own = (bind if grows or ":" in bind else _mount_point(bind, facts) for bind in container.binds)
    for bind in dict.fromkeys((*(f"{path}:{path}" for path in places), *(one for one in own if one not in places))):
        words += ["--bind", bind]
    of_node = {name: value for name, value in inside.env.items() if _FOR_MODULES.fullmatch(name)}
    env = {**of_node, **inside.inner, "USER": facts.user}
    return Start((*words, *container.args, container.image, "--", *argv), env)


def _mount_point(path: str, facts: Facts) -> str:
    """``path``, or the empty folder above it in a read-only image, where the node's folder of that name is bound: no
    mount point can be made in it. ``path`` where the image has neither: ``ch-run`` says what is missing."""
    if path in facts.in_image:
        return path
    above = (str(parent) for parent in PurePosixPath(path).parents)
    return next((parent for parent in above if parent in facts.empty_in_image), path)


_BUILDERS = {
    "apptainer": _apptainer,
    "singularity": _apptainer,
    "podman": _podman,
    "podman-hpc": _podman,
    "charliecloud": _charliecloud,
    "shifter": _shifter,
    "enroot": _enroot,
}
