"""Preconditions of a start, each as a check with its remedy. Used by ``up`` and ``doctor``."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

from gateway_plugin import haproxy as program
from gateway_plugin.adapter_folders import on_disk
from gateway_plugin.catalog import Catalog
from gateway_plugin.edge.places import places
from gateway_plugin.edge.process import open_files_limit
from gateway_plugin.errors import ConfigError, GatewayError
from gateway_plugin.hub import cache_folder
from gateway_plugin.isolation import Isolation, find_isolation
from gateway_plugin.ownership import others_write
from gateway_plugin.paths import Layout
from gateway_plugin.runtimes.here import missing
from gateway_plugin.schedulers.base import shared_script_place
from gateway_plugin.schedulers.select import is_queue, scheduler_for
from gateway_plugin.service.capacity import fit
from gateway_plugin.service.certificate import certificate
from gateway_plugin.service.checks import Check, Verdict
from gateway_plugin.service.listeners import bind_problem
from gateway_plugin.service.model_files import kind, size
from gateway_plugin.site import Limits, Site
from gateway_plugin.weights import is_local, resolve, split_revision

_DISK_FAIL_MIB = 500
_DISK_WARN_MIB = 3000
_SOCKET_PATH_MAX = 107
_RAY_TEMP_MAX = 44
"""Ray appends up to 63 characters to its folder for socket paths."""


def before_start(layout: Layout, site: Site, catalog: Catalog, ours: frozenset[int] = frozenset()) -> tuple[Check, ...]:
    """Every check that ``up`` requires. ``ours``: ports that the gateway's own live parts hold.

    Raises:
        ConfigError: site or catalog cannot work, on any machine.
    """
    checks = every_check(layout, site, catalog, ours)
    wrong = [check for check in failures(checks) if check.configuration]
    if wrong:
        raise ConfigError("; ".join(f"{check.name}: {check.found}; {check.advice}" for check in wrong))
    return checks


def every_check(layout: Layout, site: Site, catalog: Catalog, ours: frozenset[int] = frozenset()) -> tuple[Check, ...]:
    """All checks, for display: of site, catalog and machine. ``ours`` as for ``before_start``."""
    return (
        python_version(),
        *packages(site, catalog),
        *providers(site),
        *fit(site, catalog),
        edge_binary(),
        *ports(site, ours),
        *folders(layout),
        *job_scripts(layout, site),
        *disk(layout),
        open_files(site.limits),
        *runtimes(site, catalog),
        *weights(catalog, site),
        *certificate(site),
        *memory(site),
        engine_isolation(site, find_isolation(layout)),
    )


def python_version(version: tuple[int, ...] = sys.version_info[:2]) -> Check:
    """Python 3.11 or newer."""
    words = ".".join(str(number) for number in version)
    if version < (3, 11):
        return Check("python", Verdict.FAIL, words, "use Python 3.11 or newer")
    return Check("python", Verdict.OK, words)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def packages(site: Site, catalog: Catalog, installed: Callable[[str], bool] = _installed) -> Iterator[Check]:
    """The service's packages, and vLLM if engines run on this machine in this environment. Nothing is imported."""
    for module in ("ray", "parsl", "psutil", "cryptography"):
        if installed(module):
            yield Check("package " + module, Verdict.OK, "installed")
        else:
            yield Check("package " + module, Verdict.FAIL, "missing", "pip install 'gateway-plugin[serve]'")
    here = [node_type for node_type in site.node_types if node_type.engines_on_loopback and not node_type.worker_init]
    if here and any(model.engine == "vllm" and model.runtime is None for model in catalog.models):
        if installed("vllm"):
            yield Check("package vllm", Verdict.OK, "installed")
        else:
            advice = "give its entries a runtime (docs/engines.md), or pip install 'gateway-plugin[gpu]'"
            yield Check("package vllm", Verdict.FAIL, "missing, and engines run on this machine", advice)


def runtimes(site: Site, catalog: Catalog) -> Iterator[Check]:
    """What of the entries' runtimes is on this machine. Nodes of a queue may have what it lacks."""
    here = any(node_type.engines_on_loopback for node_type in site.node_types)
    for runtime in {model.runtime.name: model.runtime for model in catalog.models if model.runtime}.values():
        name = f"runtime {runtime.name}"
        if not (problem := missing(runtime, os.environ)):
            yield Check(name, Verdict.OK, "as far as it shows without a start")
        elif here:
            yield Check(name, Verdict.FAIL, problem, f"correct runtimes.{runtime.name} in the catalog")
        else:
            words = f"{problem.replace(' on this node', ' on this machine')}; a node may have it"
            yield Check(name, Verdict.WARN, words, "'gateway doctor --submit' looks on the nodes")


def providers(site: Site) -> Iterator[Check]:
    """Each node type's provider can run blocks and find them again."""
    with tempfile.TemporaryDirectory(prefix="gw-") as scratch:  # a check creates nothing in the state folder
        for node_type in site.node_types:
            name = f"provider of {node_type.name}"
            try:
                scheduler_for(node_type.provider, Layout(Path(scratch)))
            except GatewayError as error:
                advice = f"correct node type '{node_type.name}' in the site file, or give it another provider"
                yield Check(name, Verdict.FAIL, error.message, advice, configuration=True)
            else:
                yield Check(name, Verdict.OK, type(node_type.provider).__name__)


def edge_binary() -> Check:
    """HAProxy exists and can be the edge; its version, and that of its OpenSSL."""
    advice = f"install haproxy 2.8 or newer, or pip install 'gateway-plugin[serve]'; {program.CHOICE} names another"
    try:
        found = program.look(program.binary())
    except GatewayError as error:
        return Check("edge program", Verdict.FAIL, error.message, advice)
    if found.lacks:
        return Check("edge program", Verdict.WARN, f"{found}; it lacks {', '.join(found.lacks)}", advice)
    return Check("edge program", Verdict.OK, str(found))


def ports(site: Site, ours: frozenset[int] = frozenset()) -> Iterator[Check]:
    """The ports of the front door and of Ray are free, or held by this gateway."""
    for what, host, port in (
        ("front door", site.bind, site.port),
        ("Ray", "0.0.0.0", site.ray_port),  # noqa: S104 - tried, closed again at once
    ):
        name = f"port {port} ({what})"
        if port in ours:
            yield Check(name, Verdict.OK, "held by this gateway")
        elif (problem := bind_problem(host, port)) is None:
            yield Check(name, Verdict.OK, "free")
        else:
            place = " (--port)" if what == "front door" else " in the site file"
            yield Check(name, Verdict.FAIL, problem, f"end that process, or choose another port{place}")


def folders(layout: Layout) -> Iterator[Check]:
    """State and run folder belong to this user alone; socket paths are short enough."""
    for name, folder in (("state folder", layout.state), ("run folder", layout.run)):
        advice = "set another place: GATEWAY_STATE or --state for the state folder, GATEWAY_RUN_ROOT for the run folder"
        if odd := "".join(sorted(set(re.findall(r"[^\w./@%+=:,~-]", str(folder))))):
            words = f"{folder} has signs in its path that files for HAProxy cannot have: {odd!r}"
            yield Check(name, Verdict.FAIL, words, advice)
            continue
        if not folder.exists():
            parent = next(parent for parent in folder.parents if parent.exists())
            writable = os.access(parent, os.W_OK | os.X_OK)
            words = f"{folder} can be made" if writable else f"{folder} cannot be made: {parent} is not writable"
            yield Check(name, Verdict.OK if writable else Verdict.FAIL, words, "" if writable else advice)
            continue
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            yield Check(name, Verdict.FAIL, f"{folder} is not a folder of this user", advice)
        elif stat.S_IMODE(found.st_mode) & 0o077:
            mode = oct(stat.S_IMODE(found.st_mode))[2:]
            yield Check(name, Verdict.WARN, f"{folder} has mode {mode}", "'gateway up' will make it 700")
        else:
            yield Check(name, Verdict.OK, str(folder))
    longest = len(str(layout.inner_door)) + 8
    if longest > _SOCKET_PATH_MAX or len(str(layout.ray_temp)) > _RAY_TEMP_MAX:
        words = f"{layout.run} is too long a path for sockets"
        yield Check("socket paths", Verdict.FAIL, words, "set GATEWAY_RUN_ROOT to a short path on local disk")


def job_scripts(layout: Layout, site: Site) -> Iterator[Check]:
    """Where jobs in a queue have their scripts: Parsl does not quote the path. No check if it needs no quoting."""
    try:
        if any(is_queue(node_type.provider) for node_type in site.node_types):
            shared_script_place(layout)
    except ConfigError as error:
        advice = "give --state or GATEWAY_STATE another folder"
        yield Check("job scripts", Verdict.FAIL, error.message, advice, configuration=True)


def disk(layout: Layout) -> Iterator[Check]:
    """Free space where state and run folder lie."""
    for name, folder in (("disk of state", layout.state), ("disk of run", layout.run)):
        place = next(path for path in (folder, *folder.parents) if path.exists())
        free_mib = shutil.disk_usage(place).free // 2**20
        words = f"{free_mib / 1024:.1f} GiB free at {place}"
        if free_mib < _DISK_FAIL_MIB:
            yield Check(name, Verdict.FAIL, words, f"make room: at least {_DISK_FAIL_MIB} MiB")
        elif free_mib < _DISK_WARN_MIB:
            yield Check(name, Verdict.WARN, words, "logs and Ray's spilled objects want a few GiB")
        else:
            yield Check(name, Verdict.OK, words)


def open_files(limits: Limits | None = None, hard: int | None = None) -> Check:
    """The connections that the limit of open files allows the edge, and whether they meet the site's setting.

    ``limits``: the site's; the defaults if there is no site. ``hard``: the limit; this process's.
    """
    wanted = limits or Limits()
    limit = open_files_limit() if hard is None else hard
    try:
        allowed = places(limit, wanted.relayed_requests)
    except GatewayError as error:
        return Check("open files", Verdict.FAIL, error.message, "ulimit -Hn is set by the machine's administrators")
    of_one_key = allowed.of_one_key(wanted.in_flight_per_key)
    words = (
        f"{limit}: {allowed.callers} callers' connections at a time; {allowed.cold} requests for models that are not "
        f"loaded, {allowed.busy} others; {of_one_key} of one key"
    )
    less: list[tuple[str, str]] = []
    if allowed.cold < wanted.waiting_requests:
        less.append((f"lets {wanted.waiting_requests} wait", "limits.waiting_requests"))
    if of_one_key < wanted.in_flight_per_key:
        less.append((f"allows one key {wanted.in_flight_per_key}", "limits.in_flight_per_key"))
    if less:
        words += f"; the site {' and '.join(said for said, _ in less)}"
        advice = (
            f"raise it (ulimit -Hn), or lower {' and '.join(name for _, name in less)}: the rest is refused at once"
        )
        return Check("open files", Verdict.WARN, words, advice)
    return Check("open files", Verdict.OK, words)


def few_files(limits: Limits, hard: int | None = None) -> str:
    """The message of ``up`` if the limit of open files is below the site's setting; empty otherwise."""
    found = open_files(limits, hard)
    return f"Open files {found.found}. To have more, {found.advice}." if found.verdict is Verdict.WARN else ""


def weights(catalog: Catalog, site: Site | None = None) -> Iterator[Check]:
    """Weights and adapters with a path on this machine's disk exist; those of a hub are fetched, and of one revision.

    What is not fetched prevents no start: ``gateway models fetch`` works while the gateway runs. Without a ``site``,
    engines load from the hub.
    """
    fetched = None if site is None or site.fetch == "by-engine" else cache_folder(site.weights_folder)
    if fetched is not None:
        yield from _open_to_others(fetched)
    for model in catalog.models:
        try:
            on_disk(model)
        except GatewayError as error:
            what, _, advice = error.message.partition("; ")
            yield Check(f"adapters of {model.name}", Verdict.FAIL, what, f"{advice} in the catalog")
        if model.engine == "command":
            continue
        try:
            found = resolve(model, fetched=fetched)
            seen = (kind(model, found), size(model, Path(found)) if is_local(found) else None)
            yield from (check for check in seen if check is not None)
            if is_local(model.source) or split_revision(model.source)[1]:
                yield Check(f"weights of {model.name}", Verdict.OK, found)
            else:
                words = f"{model.source} without a revision: other weights are loaded once the repository has others"
                advice = f"write 'source: {model.source}@COMMIT' in the catalog"
                yield Check(f"weights of {model.name}", Verdict.WARN, words, advice)
        except GatewayError as error:
            what, _, advice = error.message.partition("; ")
            verdict = Verdict.FAIL if is_local(model.source) else Verdict.WARN
            if verdict is Verdict.WARN and (check := kind(model, model.source)) is not None:
                yield check
            if verdict is Verdict.WARN and site is not None and site.fetch == "on-request":
                verdict, advice = Verdict.OK, "fetched when the model is asked for"
            yield Check(f"weights of {model.name}", verdict, what, advice or "correct 'source' in the catalog")


def _open_to_others(folder: Path) -> Iterator[Check]:
    """A warning where other users may put weights into the folder."""
    with contextlib.suppress(OSError):  # not there yet
        if others_write(folder.stat()):
            words = f"others may write to {folder}, and engines load what is in it"
            yield Check("weights folder", Verdict.WARN, words, f"chmod go-w {folder}, unless you trust its group")


def memory(site: Site) -> Iterator[Check]:
    """Memory for the engines that may run on this machine."""
    wanted = sum(
        node_type.engine_memory_gib * node_type.max_blocks
        for node_type in site.node_types
        if node_type.engines_on_loopback
    )
    available = psutil.virtual_memory().available / 2**30
    words = f"{available:.1f} GiB available, engines may use {wanted:.1f}"
    if wanted and available < wanted + 1.5:
        yield Check("memory", Verdict.WARN, words, "lower engine_memory_gib in the site file, or end other programs")
    elif wanted:
        yield Check("memory", Verdict.OK, words)


def engine_isolation(site: Site, found: Isolation) -> Check:
    """Whether engines on this machine are isolated from the gateway's secrets. Each node checks for itself."""
    name = "engine isolation"
    if site.isolate_engines == "off":
        return Check(name, Verdict.WARN, "off: engines read what you read", "isolate_engines='auto' in the site file")
    if found.program:
        return Check(name, Verdict.OK, found.program)
    here = any(node_type.engines_on_loopback for node_type in site.node_types)
    words = f"engines on this machine read what you read: {found.reason}" if here else f"not here: {found.reason}"
    if here and site.isolate_engines == "required":
        return Check(name, Verdict.FAIL, words, "install bubblewrap, or isolate_engines='auto' in the site file")
    return Check(name, Verdict.WARN, words, "install bubblewrap where engines run")


def failures(checks: Iterable[Check]) -> tuple[Check, ...]:
    """The checks that prevent a start."""
    return tuple(check for check in checks if check.verdict is Verdict.FAIL)
