"""A stand-in for Python and Ray in a block's script, for tests of the script itself: each test sets its behaviour."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

# Called as: -m gateway_plugin.blocks.host ... | -m ray.scripts.scripts start ...
_PYTHON = """#!/bin/bash
echo "$@" >> "{calls}"
case "$*" in
  *blocks.host*) exec {python} "$@" ;;
  *ray.scripts.scripts*)
{ray}
  ;;
esac
"""
STARTS = 'touch "{folder}/ray_current_cluster"'
RUNS = "{raylet} 300 & child=$!; trap 'echo Ray was told; kill $child; exit 0' TERM; " + STARTS + "; wait"
"""Ray that runs until it receives SIGTERM."""


def stand_in(place: Path, folder: Path, ray: str) -> Path:
    """An interpreter in ``place`` that records its calls in ``calls`` and, instead of starting Ray, runs ``ray``.

    Args:
        folder: the block's, ``{folder}`` in ``ray``; ``{raylet}`` is a process that the script takes for Ray's.
    """
    raylet = place / "raylet"  # found by this name
    if not raylet.exists():
        shutil.copy("/bin/sleep", raylet)
    python = place / "my python"
    python.write_text(
        _PYTHON.format(calls=place / "calls", python=sys.executable, ray=ray.format(raylet=raylet, folder=folder))
    )
    python.chmod(0o755)
    return python
