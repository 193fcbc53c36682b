"""Walltimes: blocks that end while clients are served, on a real Slurm, every request accounted for."""

from __future__ import annotations

import time

import pytest

from gateway_plugin.blocks.ledger import Block, BlockPhase, Ledger
from tests.support.gateways import Gateway, wait_for
from tests.support.load import load
from tests.support.slurm.gateways import ever_submitted, pinned, slurm_gateway
from tests.support.slurm.virtual import VirtualSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

WAIT_S = 90.0
"""How long a request may wait for its model."""


def test_a_walltime_ends_under_load_and_no_request_fails(slurm_cluster: VirtualSlurm) -> None:
    """A block of two minutes is replaced, drained, and gone before Slurm ends it."""
    two_minutes = slurm_gateway(
        slurm_cluster, {"a": ()}, walltime="00:02:00", wait_s=WAIT_S, drain_before_end_s=30.0, leave_before_end_s=45.0
    )
    with two_minutes as gateway:
        submitted = ever_submitted(slurm_cluster)
        pinned(gateway, "a")
        with load(gateway, ("a",), clients=2) as account:
            wait_for(lambda: ended_blocks(gateway), 180, "a block that left")
            left_at = time.monotonic()
            wait_for(lambda: account.answers(since=left_at) >= 8, WAIT_S, "answers after it")
        ended = ended_blocks(gateway)
        jobs = ever_submitted(slurm_cluster) - submitted
    assert (account.failed, account.cut, account.refused) == ([], [], [])
    assert len(jobs) - len(ended) in (1, 2), "what serves, and perhaps its successor"
    for block in ended:  # left by itself, or was given back when it was drained; Slurm never had to end one (EXPIRED)
        assert block.phase in (BlockPhase.COMPLETED, BlockPhase.CANCELLED), block


def ended_blocks(gateway: Gateway) -> list[Block]:
    return [block for block in Ledger(gateway.layout.ledger).read().values() if block.phase.ended]
