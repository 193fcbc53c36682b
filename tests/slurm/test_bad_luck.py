"""What goes wrong on a cluster while clients are served: each on a real Slurm, every request accounted for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.support.gateways import Gateway, wait_for
from tests.support.load import load
from tests.support.slurm.gateways import (
    all_nodes_taken,
    at_rest,
    emptied,
    ever_submitted,
    pinned,
    queued,
    slurm_gateway,
)
from tests.support.slurm.virtual import VirtualSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(420)]

WAIT_S = 90.0
"""How long a request may wait for its model."""
MODELS = ("a", "b")
"""One fits on a node, and there are two nodes."""


@pytest.fixture(scope="module")
def shared(slurm_cluster: VirtualSlurm) -> Iterator[Gateway]:
    with slurm_gateway(slurm_cluster, dict.fromkeys(MODELS, ()), wait_s=WAIT_S, block_idle_s=600.0) as made:
        yield made


@pytest.fixture
def running(shared: Gateway, slurm_cluster: VirtualSlurm) -> Gateway:
    """The shared gateway, after whatever the test before did to it."""
    at_rest(shared, slurm_cluster)
    return shared


def test_a_queue_without_a_free_node_is_waited_for_with_one_job(running: Gateway, slurm_cluster: VirtualSlurm) -> None:
    emptied(running, slurm_cluster)
    before = ever_submitted(slurm_cluster)
    jobs: set[str] = set()
    with ThreadPoolExecutor(1) as one, ExitStack() as until_freed:
        until_freed.enter_context(all_nodes_taken(slurm_cluster))
        began = time.monotonic()
        impatient = one.submit(running.chat, "a")

        def jobs_seen_until(passed_s: float) -> bool:
            jobs.update(job.id for job in queued(slurm_cluster))
            return time.monotonic() > began + passed_s or impatient.done()

        # The others come late enough to have most of their time left when it gives up.
        wait_for(lambda: jobs_seen_until(WAIT_S - 10), WAIT_S, "the first client nearly giving up")
        with load(running, ("a",)) as account:
            wait_for(lambda: jobs_seen_until(WAIT_S + 30), WAIT_S, "the first client giving up")
            refused = impatient.result(30)
            assert not account.answered
            until_freed.close()
            wait_for(lambda: account.answers() >= 12, WAIT_S, "answers")
    assert refused.status_code == 503, refused.text
    error = refused.json()["error"]
    assert (error["code"], error["state"]) == ("wait_deadline", "queued")
    assert (account.failed, account.cut, account.refused) == ([], [], [])
    assert len(jobs) == 1
    assert ever_submitted(slurm_cluster) - before == jobs


def test_a_controller_of_slurms_away_for_half_a_minute_is_not_noticed(
    running: Gateway, slurm_cluster: VirtualSlurm
) -> None:
    pinned(running, *MODELS)
    pids = running.engine_pids()
    jobs, submitted = queued(slurm_cluster, "RUNNING"), ever_submitted(slurm_cluster)
    assert len(jobs) == len(MODELS)
    with load(running, MODELS) as account:
        slurm_cluster.stop_controller()
        gone_at = time.monotonic()
        wait_for(lambda: account.answers(since=gone_at + 30) >= 10, 120, "answers after 30 s without Slurm")
        slurm_cluster.start_controller()
        back_at = time.monotonic()
        wait_for(lambda: account.answers(since=back_at + 10) >= 10, 60, "answers with Slurm again")
    assert (account.failed, account.cut, account.refused) == ([], [], [])
    assert queued(slurm_cluster, "RUNNING") == jobs
    assert ever_submitted(slurm_cluster) == submitted
    assert running.engine_pids() == pids
