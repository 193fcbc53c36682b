"""A gateway's folders, and the jobs of a real Slurm in them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_plugin.paths import Layout, private_folder
from tests.support.slurm.virtual import VirtualSlurm


@pytest.fixture
def layout(slurm: VirtualSlurm) -> Iterator[Layout]:
    """Before ``slurm``'s end, the jobs in it are ended."""
    root = Path(tempfile.mkdtemp(prefix="gwt-", dir="/tmp"))
    layout = Layout(private_folder(root / "state"))
    layout.make()
    yield layout
    slurm.clear()
    shutil.rmtree(root)
    shutil.rmtree(layout.run)
