"""What all unit tests have."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_run_folders() -> Iterator[None]:
    """Run folders, where a test gives them no other place: gone afterwards, and short (AF_UNIX)."""
    with pytest.MonkeyPatch.context() as here, tempfile.TemporaryDirectory(prefix="gwu-", dir="/tmp") as root:
        here.setenv("GATEWAY_RUN_ROOT", root)
        yield
