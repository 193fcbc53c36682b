"""The endpoint's own virtual environment: made once from a pinned list, and made again when the list changes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gateway_plugin.errors import ConfigError, ServiceError
from gateway_plugin.globus.endpoint.shared_folder import READABLE_UMASK, check_only_root_changes, interpreter

_LIST = Path(__file__).with_name("requirements.txt")
_WHAT = ("--no-deps", "--require-hashes", "-r", str(_LIST))
_PATIENCE_S = 900.0


def program(venv: Path) -> Path:
    """The endpoint's command in ``venv``."""
    return venv / "bin" / "globus-compute-endpoint"


def is_complete(venv: Path) -> bool:
    """Whether ``venv`` was made from the list of this version."""
    return _stamp(venv).exists() and program(venv).exists()


def make(venv: Path, report: Callable[[str], None], python: str | None = None) -> None:
    """Make ``venv`` unless it is complete. ``python``: the interpreter; by default this one's base, for root the
    system's where others could change that.

    Raises:
        ConfigError: root has no interpreter that only root can change.
        ServiceError: it could not be made; the message has the installer's last lines.
    """
    if is_complete(venv):
        return
    base = python or str(getattr(sys, "_base_executable", sys.executable))
    if python is None and os.getuid() == 0:
        base = str(interpreter(Path(base)))
    report("virtual environment")
    # -I: files in the working folder are not imported
    _run([base, "-I", "-m", "venv", "--clear", *(["--without-pip"] if _uv() else []), str(venv)])
    report(f"{sum(1 for line in _LIST.read_text().splitlines() if '==' in line)} packages")
    inside = str(venv / "bin" / "python")
    uv = _uv()
    # Compiled here: its users may not be able to write there, and would compile it at every start.
    install = [str(uv), "pip", "install", "--quiet", "--compile-bytecode", "--python", inside, *_WHAT]
    if uv is None or _ended(install).returncode != 0:
        if uv is not None:  # it does not read pip's configuration: where only pip finds the way out, pip does it
            _run([base, "-I", "-m", "venv", "--clear", str(venv)])
        _run([inside, "-I", "-m", "pip", "--disable-pip-version-check", "--quiet", "install", *_WHAT])
    _stamp(venv).touch()


def _uv() -> str | None:
    """The program, if there is one; root runs none that others could change."""
    found = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    try:
        if found is not None and os.getuid() == 0:
            check_only_root_changes(Path(found))
    except ConfigError:
        return None  # pip does it, slower
    return found


def _stamp(venv: Path) -> Path:
    return venv / f".complete-{hashlib.sha256(_LIST.read_bytes()).hexdigest()[:12]}"


def _ended(argv: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE_S,
            umask=READABLE_UMASK,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError(f"The endpoint's environment could not be made: {error}") from error


def _run(argv: list[str]) -> None:
    began = time.monotonic()
    ended = _ended(argv)
    if ended.returncode != 0:
        last = "\n".join((ended.stderr or ended.stdout).strip().splitlines()[-8:])
        took = time.monotonic() - began
        raise ServiceError(
            f"The endpoint's environment could not be made ({argv[0]} failed after {took:.0f} s):\n{last}"
        )
