"""A node's report for ``gateway doctor --submit``."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

PACKAGES = ("ray", "parsl", "gateway-plugin", "cryptography", "vllm")
_CALL_S = 10.0
_GPU_MEMORY = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
_ISOLATION = ("bwrap", "--unshare-user", "--dev-bind", "/", "/", "true")


def report(head: str, address: str, port: int, environ: Mapping[str, str]) -> dict[str, Any]:
    """The fields of ``doctor.node_report.Report``.

    Args:
        head: ``IP:port`` to connect to.
        address: this node's own.
        port: where this node accepts connections meanwhile.
    """
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
    }


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
