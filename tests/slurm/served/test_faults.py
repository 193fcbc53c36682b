"""What goes wrong on a cluster while clients are served: each on a real Slurm, every request accounted for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import httpx
import psutil
import pytest

from gateway_plugin.blocks.ledger import Block, BlockPhase, Ledger
from gateway_plugin.service import ray_head
from gateway_plugin.service.discovery import deployments_of, edges_of, supervisors_of
from tests.slurm.served.conftest import MODELS, WAIT_S
from tests.support.clusters import opened
from tests.support.gateways import Gateway, chat_body, wait_for
from tests.support.load import Account, load
from tests.support.slurm.gateways import (
    all_nodes_taken,
    at_rest,
    blocks_of,
    emptied,
    engine_nodes,
    ever_submitted,
    pinned,
    queued,
)
from tests.support.slurm.virtual import VirtualSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

PATIENCE_S = 12
"""How long the one client waits that says so."""


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
        impatient = one.submit(chat_that_waits, running, "a", PATIENCE_S)

        def jobs_seen_until(passed_s: float) -> bool:
            jobs.update(job.id for job in queued(slurm_cluster))
            return time.monotonic() > began + passed_s or impatient.done()

        # The others come late enough to have most of their time left when it gives up.
        wait_for(lambda: jobs_seen_until(PATIENCE_S / 2), WAIT_S, "the first client being half way to giving up")
        with load(running, ("a",)) as account:
            wait_for(lambda: jobs_seen_until(WAIT_S / 2), WAIT_S, "the first client giving up")
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


def chat_that_waits(gateway: Gateway, model: str, patience_s: int) -> httpx.Response:
    """One chat completion of a client that says how long it is ready to wait for the model."""
    with gateway.client() as client:
        wait = {"x-gateway-wait": str(patience_s)}
        return client.post("/v1/chat/completions", json=chat_body(model), headers=wait)


def test_while_slurms_controller_is_away_what_runs_is_served_and_what_is_asked_for_is_loaded_afterwards(
    running: Gateway, slurm_cluster: VirtualSlurm
) -> None:
    if engine_nodes(running).keys() != {"a"} or len(blocks_of(running)) != 1:
        emptied(running, slurm_cluster)
    pinned(running, "a")
    pids, served, submitted = running.engine_pids(), queued(slurm_cluster, "RUNNING"), ever_submitted(slurm_cluster)
    refused = refused_blocks(running)
    assert len(served) == 1
    with load(running, ("a",), clients=2) as warm, ExitStack() as until_back:
        until_back.enter_context(controller_away(slurm_cluster))
        gone_at = time.monotonic()
        cold = until_back.enter_context(load(running, ("b",), clients=2))
        wait_for(lambda: refused_blocks(running, refused), WAIT_S, "a block that could not be submitted")
        wait_for(lambda: warm.answers(since=gone_at + 15) >= 10, WAIT_S, "answers after 15 s without Slurm")
        slurm_cluster.start_controller()
        back_at = time.monotonic()
        wait_for(lambda: cold.answers() >= 12, WAIT_S, "answers of the model asked for meanwhile")
        wait_for(lambda: warm.answers(since=back_at + 5) >= 10, WAIT_S, "answers with Slurm again")
    for account in (warm, cold):
        assert (account.failed, account.cut, account.refused) == ([], [], [])
    assert set(served) <= set(queued(slurm_cluster, "RUNNING"))
    assert len(ever_submitted(slurm_cluster) - submitted) == 1
    assert pids.items() <= running.engine_pids().items()


@contextmanager
def controller_away(slurm: VirtualSlurm) -> Iterator[None]:
    """No slurmctld, and at the end one again whatever happened, if it was not started before."""
    slurm.stop_controller()
    try:
        yield
    finally:
        slurm.repair()


def test_all_of_the_gateway_killed_and_up_again_with_its_blocks_running(
    running: Gateway, slurm_cluster: VirtualSlurm
) -> None:
    pinned(running, *MODELS)
    pids, jobs, submitted = running.engine_pids(), queued(slurm_cluster, "RUNNING"), ever_submitted(slurm_cluster)
    with load(running, MODELS) as account:
        wait_for(lambda: account.answers() >= 8, WAIT_S, "answers before")
        killed_at = time.monotonic()
        kill_all_but_blocks(running)
        down_at = time.monotonic()
        running.up()
        up_at = time.monotonic()
        wait_for(lambda: knows_its_engines(running), WAIT_S, "ready")
        again_at = time.monotonic()
        wait_for(lambda: account.answers(since=again_at) >= 20, WAIT_S, "answers after")
    assert account.failed == []
    assert all(cut.sent_at < down_at and killed_at < cut.ended_at for cut in account.cut), account.cut
    assert all(killed_at < refused.sent_at < up_at for refused in account.refused), account.refused
    assert running.engine_pids() == pids
    assert queued(slurm_cluster) == jobs
    assert ever_submitted(slurm_cluster) == submitted


def knows_its_engines(gateway: Gateway) -> bool:
    try:
        return gateway.status()["state"] == "ready" and engine_nodes(gateway).keys() == set(MODELS)
    except httpx.HTTPError:
        return False


def kill_all_but_blocks(gateway: Gateway) -> None:
    """``kill -9`` to supervisor, edge and everything of the Ray head, at once; engines and blocks are left alone."""
    layout = gateway.layout
    marks = (*supervisors_of(layout), *edges_of(layout), *deployments_of(layout))
    victims = opened((*marks, *ray_head.leftover_processes(layout)))
    for process in victims:  # the supervisor first: it would start the others again
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert not psutil.wait_procs(victims, timeout=20)[1]
    assert len(marks) >= 2


def test_a_block_that_is_cancelled_by_hand_costs_no_request(running: Gateway, slurm_cluster: VirtualSlurm) -> None:
    node = pinned(running, *MODELS)["a"]
    (job,) = [job for job in queued(slurm_cluster, "RUNNING") if job.node == node]
    submitted = ever_submitted(slurm_cluster)
    with load(running, MODELS) as account:
        wait_for(lambda: account.answers("a") >= 8, WAIT_S, "answers before")
        slurm_cluster.run("scancel", job.id)
        wait_for(lambda: job.id not in {other.id for other in queued(slurm_cluster)}, WAIT_S, "the job's end")
        ended_at = time.monotonic()
        wait_for(lambda: account.answers("a", since=ended_at) >= 8, WAIT_S, "answers from another block")
    assert (account.failed, account.cut, account.refused) == ([], [], [])
    assert len(ever_submitted(slurm_cluster) - submitted) == 1


def test_a_node_that_loses_its_power_costs_only_what_streams_on_it(
    running: Gateway, slurm_cluster: VirtualSlurm
) -> None:
    number = int(pinned(running, *MODELS)["a"].removeprefix("n"))
    submitted = ever_submitted(slurm_cluster)
    with load(running, MODELS) as account:
        wait_for(lambda: account.answers("a") >= 8, WAIT_S, "answers before")
        down_at = time.monotonic()
        slurm_cluster.crash_node(number)
        wait_for(lambda: "a" not in engine_nodes(running), WAIT_S, "the loss is noticed")
        slurm_cluster.start_node(number)
        wait_for(lambda: account.answers("a", since=down_at) >= 12, WAIT_S, "answers from another block")
    assert_only_streams_were_cut(account, "a", down_at)
    assert len(ever_submitted(slurm_cluster) - submitted) == 1


def test_a_node_whose_daemon_is_killed_is_left_when_slurm_gives_its_job_up(
    running: Gateway, slurm_cluster: VirtualSlurm
) -> None:
    """Nobody ends what runs on such a node: its engines would serve on, on a node that is not ours any more."""
    node = pinned(running, *MODELS)["a"]
    (job,) = [job for job in queued(slurm_cluster, "RUNNING") if job.node == node]
    submitted = ever_submitted(slurm_cluster)
    (engine,) = [engine["id"] for engine in running.status()["engines"] if engine["model"] == "a"]
    pid = running.engine_pids()[engine]
    with load(running, MODELS) as account:
        wait_for(lambda: account.answers("a") >= 8, WAIT_S, "answers before")
        slurm_cluster.kill_node_daemon(int(node.removeprefix("n")))
        wait_for(
            lambda: job.id not in {other.id for other in queued(slurm_cluster)}, 2 * WAIT_S, "Slurm giving the job up"
        )
        wait_for(lambda: not psutil.pid_exists(pid), WAIT_S, "the engine's end")
        slurm_cluster.start_node(int(node.removeprefix("n")))
        back_at = time.monotonic()
        wait_for(lambda: account.answers("a", since=back_at) >= 8, WAIT_S, "answers from another block")
    assert (account.failed, account.cut, account.refused) == ([], [], [])
    assert len(ever_submitted(slurm_cluster) - submitted) == 1


def assert_only_streams_were_cut(account: Account, model: str, down_at: float) -> None:
    """Nothing else than streams of ``model`` that were sent before its node went down."""
    assert (account.failed, account.refused) == ([], [])
    for cut in account.cut:
        assert cut.stream, cut
        assert cut.model == model, cut
        assert cut.sent_at < down_at + 1.0, cut


def test_a_partition_that_takes_no_jobs_is_asked_again_until_it_does(
    running: Gateway, slurm_cluster: VirtualSlurm
) -> None:
    emptied(running, slurm_cluster)
    submitted, refused = ever_submitted(slurm_cluster), refused_blocks(running)
    with ExitStack() as until_up:
        slurm_cluster.run("scontrol", "update", "partitionname=debug", "state=drain")
        until_up.callback(slurm_cluster.run, "scontrol", "update", "partitionname=debug", "state=up")
        with load(running, ("a",)) as account:
            wait_for(lambda: len(refused_blocks(running, refused)) >= 2, WAIT_S, "blocks that Slurm refuses")
            until_up.close()
            wait_for(lambda: account.answers() >= 12, WAIT_S, "answers")
    assert (account.failed, account.cut, account.refused) == ([], [], [])
    assert "partition" in (refused_blocks(running, refused)[0].reason or "").lower()
    assert len(ever_submitted(slurm_cluster) - submitted) == 1


def refused_blocks(gateway: Gateway, before: Sequence[Block] = ()) -> list[Block]:
    """Blocks that never had a job, the oldest first, without those ``before``."""
    known = {block.name for block in before}
    blocks = Ledger(gateway.layout.ledger).read().values()
    refused = [block for block in blocks if block.phase is BlockPhase.FAILED and block.name not in known]
    return sorted(refused, key=lambda block: block.asked_at)
