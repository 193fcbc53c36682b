"""Isolation of engines from the gateway's secrets, by bubblewrap, on nodes that have it.

An engine runs as the gateway's owner. Its file system is the node's (devices too), except that the state folder, the
node's run folder and some folders with a user's credentials are empty, but for the files in them that the engine needs.
It has a user namespace of its own, without capabilities: the kernel then keeps it from undoing this, and from the
memory, the environment and the root folder of the owner's other processes.

Not restricted: the network, signals to the owner's processes, and writing elsewhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway_plugin.catalog import Model
from gateway_plugin.errors import ServiceError
from gateway_plugin.hub_cache import shown_for
from gateway_plugin.paths import Layout, default_state_root

_OF_THE_OWNER = (
    *(".ssh", ".gnupg", ".aws", ".kube", ".netrc", ".git-credentials", ".config/gh", ".config/gcloud", ".azure"),
    *(".globus", ".globus_compute", ".globusonline", ".config/gateway-plugin", ".docker/config.json"),
    ".pgpass",
)
"""In the home folder: credentials that no engine needs."""
_OF_THE_SYSTEM = ("/run/user/{uid}", "/run/munge", "/run/slurm", "/tmp/krb5cc_{uid}", "/tmp/tmux-{uid}")  # noqa: S108 - hidden, not used
"""Ways to run something as the owner: the session's bus, Slurm's sockets, Kerberos tickets."""
_PROBE_S = 20.0
_SEES = 'test -r "$1" && ! test -e "$2"'


@dataclass(frozen=True)
class Isolation:
    """Whether engines can be isolated on this node."""

    program: str = ""
    """bubblewrap's path; ``""``: not available."""
    reason: str = ""
    """Why it is not available."""
    network: bool = False
    """An engine can have a network of its own, in which there is loopback alone."""


@dataclass(frozen=True)
class Hidden:
    """Paths hidden from engines: resolved, none below another."""

    folders: tuple[Path, ...] = ()
    files: tuple[Path, ...] = ()

    def holds(self, path: Path) -> bool:
        """Whether ``path`` is inside a hidden folder."""
        return any(folder in path.parents for folder in self.folders)


def wrapper(
    program: str, hidden: Hidden, shown: Iterable[Path], written: Iterable[Path] = (), alone: bool = False
) -> tuple[str, ...]:
    """The arguments before an engine's command line: pure. Its process leads a session of its own.

    Args:
        shown: files and folders that it reads; those that are not hidden are left out.
        written: folders that it writes; likewise.
        alone: with a network of its own.
    """
    words = [program, "--unshare-user", "--cap-drop", "ALL", "--new-session", "--dev-bind", "/", "/"]
    words += ["--unshare-net"] if alone else []
    for folder in hidden.folders:
        words += ["--tmpfs", str(folder)]
    for file in hidden.files:
        words += ["--dev-bind", "/dev/null", str(file)]
    for option, paths in (("--ro-bind", shown), ("--bind", written)):
        for path in dict.fromkeys(paths):
            if hidden.holds(path):
                words += [option, str(path), str(path)]
    for folder in hidden.folders:
        words += ["--remount-ro", str(folder)]
    return tuple(words)


def hidden_here(layout: Layout, home: Path | None = None, more: Iterable[Path] = ()) -> Hidden:
    """The existing paths to hide on this machine (with those in ``more``), under each path that leads to them."""
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    system = (Path(place.format(uid=os.getuid())) for place in _OF_THE_SYSTEM)
    places = (
        layout.state,
        default_state_root(),
        layout.run,
        *((home or Path.home()) / name for name in _OF_THE_OWNER),
        *system,
        *more,
    )
    found: set[Path] = set()
    for place in (place.resolve() for place in places if os.path.exists(place)):  # closed to us: to engines too
        found.add(place)
        found |= {alias for alias in aliases(place, mounts) if _leads_to(alias, place)}
    folders = {path for path in found if path.is_dir()}
    outer = tuple(sorted(path for path in folders if not folders & set(path.parents)))
    files = tuple(sorted(path for path in found - folders if not folders & set(path.parents)))
    return Hidden(outer, files)


def _leads_to(alias: Path, place: Path) -> bool:
    try:
        return alias.samefile(place)
    except OSError:
        return False  # something else is mounted over it, or this user has no access


def aliases(path: Path, mountinfo: str) -> tuple[Path, ...]:
    """Other paths to the folder ``path`` by other mounts of its file system: pure. ``mountinfo``: of ``/proc/self``."""
    mounts: list[tuple[str, Path, Path]] = []
    for fields in (line.split() for line in mountinfo.splitlines()):
        device, root, point = fields[2], *(Path(_unescaped(field)) for field in fields[3:5])
        mounts.append((device, root, point))
    holding = [mount for mount in mounts if path.is_relative_to(mount[2])]
    if not holding:
        return ()
    device, root, point = max(enumerate(holding), key=lambda found: (len(found[1][2].parts), found[0]))[1]
    inside = root / path.relative_to(point)
    others = (at / inside.relative_to(top) for dev, top, at in mounts if dev == device and inside.is_relative_to(top))
    return tuple(dict.fromkeys(other for other in others if other != path))


def _unescaped(field: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field


def find_isolation(layout: Layout, program: str = "bwrap") -> Isolation:
    """Try it on this node: whether an isolated process can read its files, and nothing else of the gateway."""
    found = shutil.which(program)
    if found is None:
        return Isolation(reason=f"there is no {program} on PATH (package bubblewrap)")
    seen, unseen = layout.engine_key.resolve(), layout.agent_identity.resolve()
    there = seen.is_file()  # not before the first 'up': then only whether it starts at all can be tested
    trial = ("sh", "-c", _SEES, "sh", str(seen), str(unseen)) if there else ("true",)
    argv = (*wrapper(found, hidden_here(layout), [seen] if there else ()), "--", *trial)
    try:
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=_PROBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Isolation(reason=f"{found}: {error}")
    if ended.returncode:
        said = ended.stderr.strip().splitlines()
        return Isolation(reason=said[-1] if said else f"{found}: what it should hide is seen, or the reverse")
    apart = (*wrapper(found, Hidden(), (), alone=True), "--", "true")
    try:
        network = subprocess.run(apart, capture_output=True, timeout=_PROBE_S, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        network = False
    return Isolation(found, network=network)


def isolated(
    found: Isolation,
    wanted: str,
    model: Model,
    layout: Layout,
    source: str,
    env: Mapping[str, str],
    read: Iterable[str] = (),
    written: Iterable[str] = (),
    alone: bool = False,
) -> tuple[str, ...]:
    """The arguments before the command line of ``model``'s engine; ``()``: it is not isolated.

    Args:
        wanted: ``Site.isolate_engines``.
        source: where its weights are.
        env: its environment; folders in it are writable, wherever they are.
        read, written: further paths of its runtime, and the folder of its socket.
        alone: with a network of its own where that is possible, so that no other process reaches its port.

    Raises:
        ServiceError: the site requires isolation, and it is not available.
    """
    if wanted == "required" and not (found.program and model.isolated):
        why = found.reason if model.isolated else "its entry says 'isolated: false'"
        raise ServiceError(f"the site wants isolated engines (isolate_engines), and this one cannot be: {why}")
    if wanted == "off" or not model.isolated or not found.program:
        return ()
    tls = (str(layout.engine_key), str(layout.engine_certificate), str(layout.ca))
    weights = str(shown_for(source)) if source.startswith("/") else source
    seen = (*tls, weights, sys.prefix, sys.base_prefix, *read, *env.get("PYTHONPATH", "").split(":"))
    shown = [Path(place).resolve() for place in seen if place.startswith("/")]
    hidden = hidden_here(layout, more=_logins(env) if source.startswith("/") else ())
    named = [Path(value).resolve() for value in (*written, *env.values()) if value.startswith("/") and ":" not in value]
    writable = [path for path in named if path.is_dir() and path not in shown]
    return wrapper(found.program, hidden, shown, writable, alone and found.network)


def _logins(env: Mapping[str, str]) -> tuple[Path, ...]:
    """The hub's own login: an engine that loads from disk has no use for it."""
    home = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return tuple(Path(home).expanduser() / name for name in ("token", "stored_tokens"))
