"""The properties of the core once more, with a seed that no run had before: the others of a run are always the same."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILES = ("test_properties.py", "test_growth_properties.py", "test_replay.py")

EXAMPLES = "40"
"""Of each property: others with every run."""


@pytest.mark.process
@pytest.mark.parametrize("file", FILES)
def test_with_a_fresh_seed(file: str) -> None:
    seed = secrets.randbelow(2**32)
    path = f"tests/unit/core/{file}"
    argv = ("-m", "pytest", "-q", "-m", "hypothesis", f"--hypothesis-seed={seed}", path)
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**own, "GATEWAY_FRESH": "1", "GATEWAY_EXAMPLES": EXAMPLES}
    done = subprocess.run(
        (sys.executable, *argv), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    again = f"GATEWAY_FRESH=1 GATEWAY_EXAMPLES={EXAMPLES} .venv/bin/python {' '.join(argv)}"
    assert done.returncode == 0, f"{done.stdout[-6000:]}\nseed {seed}; once more: {again}"
