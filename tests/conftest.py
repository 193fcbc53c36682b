"""What all kinds of tests may ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.slurm.virtual import VirtualSlurm, missing, virtual_slurm


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[VirtualSlurm]:
    """One virtual Slurm for the whole run; tests take ``slurm``."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with virtual_slurm() as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_cluster: VirtualSlurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[VirtualSlurm]:
    """The virtual Slurm, found by this process's own commands, with an empty queue and all nodes up."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.places.conf))
    yield slurm_cluster
    slurm_cluster.clear()
