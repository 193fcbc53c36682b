"""A node's report for ``gateway doctor --submit``."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from gateway_plugin.blocks.leaving import Settings
from gateway_plugin.paths import Layout

PACKAGES = ("ray", "parsl", "gateway-plugin", "cryptography", "vllm")
_CALL_S = 10.0
_RUNTIME_S = 25.0
"""For the start of a runtime: a job of a minute must report."""
_GPU_MEMORY = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
_GPU_NAMES = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
_ISOLATION = ("bwrap", "--unshare-user", "--dev-bind", "/", "/", "true")


def report(settings: Settings, address: str, port: int, environ: Mapping[str, str]) -> dict[str, Any]:
    """The fields of ``doctor.node_report.Report``.

    Args:
        settings: of the trial job. What the catalog wants of runtimes is beside its report, if there is any.
        address: this node's own.
        port: where this node accepts connections meanwhile.
    """
    head, file = settings.head, Path(settings.report)
    layout = Layout(Path(settings.state))
    return {
        "host": platform.node(),
        "time_s": time.time(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "head": call(head.rpartition(":")[0], head.rpartition(":")[2]),
        "address": address,
        "port": port,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "visible_gpus": environ.get("CUDA_VISIBLE_DEVICES", ""),
        "gpu_mib": [int(row) for row in _said(_GPU_MEMORY)[1].split() if row.isdigit()],
        "isolation": _isolation(),
        "gpus": [line.strip() for line in _said(_GPU_NAMES)[1].splitlines() if "," in line],
        "cuda": _cuda(),
        "runtimes": _runtimes(wanted_file(file), layout, environ),
    }


def wanted_file(report: Path) -> Path:
    """Where ``doctor`` puts what the catalog wants of runtimes, beside the report's file."""
    return report.with_suffix(".runtimes")


def _runtimes(file: Path, layout: Layout, environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Each runtime's versions, or its problem. All at once: a trial job is short."""
    from gateway_plugin.runtimes.here import look  # a block that only starts Ray does without pydantic
    from gateway_plugin.runtimes.versions import Wanted

    try:
        tried = Wanted.model_validate_json(file.read_bytes()).tried
    except (OSError, ValueError):
        return {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = pool.map(lambda one: look(one, layout, environ, _RUNTIME_S), tried)
        return {one.runtime.name: seen.model_dump() for one, seen in zip(tried, found, strict=True)}


def _cuda() -> str:
    """The newest CUDA that the driver knows; empty if ``nvidia-smi`` does not say."""
    found = re.search(r"CUDA Version:\s*([\d.]+)", _said(("nvidia-smi",))[1])
    return found[1] if found else ""


def version(package: str) -> str:
    """The installed version; ``missing`` if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def call(address: str, port: str | int, timeout_s: float = _CALL_S) -> str:
    """``reached``, or the reason for the failure."""
    try:
        socket.create_connection((address, int(port)), timeout=timeout_s).close()
    except OSError as error:
        return error.strerror or str(error)
    return "reached"


def _isolation() -> str:
    """``works``: bubblewrap works; or the reason why not."""
    code, _, complaint = _said(_ISOLATION)
    return "works" if code == 0 else complaint.partition("\n")[0] or "failed"


def _said(argv: Sequence[str]) -> tuple[int, str, str]:
    """Exit code and output of a command; a missing one, or one without an answer, is reported in the same form."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=30, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return -1, "", str(error)
    return done.returncode, done.stdout, done.stderr
