"""A gateway's folders, and the jobs of a stand-in for PBS in them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_plugin.paths import Layout, private_folder
from tests.support.pbs.virtual import VirtualPbs


@pytest.fixture
def layout(pbs: VirtualPbs) -> Iterator[Layout]:
    """Before its scripts are removed, the jobs in it are ended: ``pbs`` outlives it."""
    root = Path(tempfile.mkdtemp(prefix="gwt-", dir="/tmp"))
    layout = Layout(private_folder(root / "state"))
    layout.make()
    yield layout
    for number, job in pbs.jobs().items():
        if job["job_state"] != "F":
            pbs.set(away=False)
            pbs.run("qdel", "-W", "force", number)
    shutil.rmtree(root)
    shutil.rmtree(layout.run)
