"""One gateway for the tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.gateways import Gateway
from tests.support.slurm.gateways import slurm_gateway
from tests.support.slurm.virtual import VirtualSlurm

WAIT_S = 120.0
"""How long a request may wait for its model."""
MODELS = ("a", "b")
"""One fits on a node, and there are two nodes."""


@pytest.fixture(scope="package")
def shared(slurm_cluster: VirtualSlurm) -> Iterator[Gateway]:
    with slurm_gateway(slurm_cluster, dict.fromkeys(MODELS, ()), wait_s=WAIT_S, block_idle_s=600.0) as made:
        yield made
