"""What all kinds of tests may ask for."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.pbs.virtual import VirtualPbs
    from tests.support.slurm.virtual import VirtualSlurm


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Ctrl-C works in every test and its children: not so in a background job's, nor where a command was interrupted
    in this process before, which then ignores it on purpose."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        if handler is not None:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[VirtualSlurm]:
    """One virtual Slurm for the whole run; tests take ``slurm``."""
    from tests.support.slurm.virtual import missing, virtual_slurm  # imports Ray: not for tests that need no Slurm

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


@pytest.fixture
def pbs(monkeypatch: pytest.MonkeyPatch) -> Iterator[VirtualPbs]:
    """A stand-in for PBS whose commands this process finds."""
    from tests.support.pbs.virtual import virtual_pbs

    with virtual_pbs() as standin:
        monkeypatch.setenv("PATH", f"{standin.bin}:{os.environ['PATH']}")
        yield standin
