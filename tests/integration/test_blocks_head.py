"""A real Ray head and real blocks: growth, giving back, and everything of the head killed while a block runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from gateway_plugin.blocks.ledger import Block, BlockPhase
from gateway_plugin.paths import block_folder
from gateway_plugin.processes import block_processes
from tests.support.clusters import LocalCluster, local_cluster, opened, ray_sessions, wait_for

pytestmark = pytest.mark.integration

AGENT = """
import json, os, subprocess, sys
@ray.remote
class Agent:
    def __init__(self):
        self.asked = 0
    def ask(self):
        self.asked += 1
        return {"pid": os.getpid(), "asked": self.asked, "block": os.environ["RAY_CLOUD_INSTANCE_ID"],
                "run_root": os.environ["GATEWAY_RUN_ROOT"], "umask": os.umask(0o077)}
agent = Agent.options(name="agent", lifetime="detached", num_cpus=0, resources={"gateway_local": 1}).remote()
print(json.dumps(ray.get(agent.ask.remote())))
"""
ASK = "import json; print(json.dumps(ray.get(ray.get_actor('agent').ask.remote())))"
GIVEN_BACK = (BlockPhase.COMPLETED, BlockPhase.CANCELLED)
"""Ray drains a node and then, if its job has not left by itself yet, cancels it."""
KILL = "ray.kill(ray.get_actor('agent'))"
FULL = "export RAY_memory_usage_threshold=0.05 RAY_memory_monitor_refresh_ms=250"
"""To Ray's memory monitor, were it on, the node is nearly full."""


@pytest.fixture(scope="module")
def running() -> Iterator[LocalCluster]:
    with local_cluster(worker_init=FULL) as cluster:
        yield cluster


@pytest.fixture
def cluster(running: LocalCluster) -> Iterator[LocalCluster]:
    """The cluster with no block, whatever the test before left."""
    yield running
    if running.blocks():
        given_back(running)


def asked(cluster: LocalCluster, code: str) -> dict[str, object]:
    answer: dict[str, object] = json.loads(cluster.drive(code))
    return answer


def only_block(cluster: LocalCluster) -> Block:
    (block,) = cluster.blocks()
    return block


def given_back(cluster: LocalCluster) -> Block:
    """Kill the agent; the block as it ended."""
    block = only_block(cluster)
    cluster.drive(KILL)
    wait_for(lambda: not cluster.blocks(), "the block's end", timeout_s=60)
    (ended,) = [known for known in cluster.blocks(ended=True) if known.name == block.name]
    return ended


def left_of(cluster: LocalCluster, block: Block) -> list[psutil.Process]:
    return opened(block_processes(block.name, block_folder(cluster.layout.run, block.name)))


def test_an_agent_gets_a_block_on_a_full_node_and_its_end_gives_the_block_back(
    cluster: LocalCluster, record_property: Callable[[str, object], None]
) -> None:
    began = time.monotonic()
    answer = asked(cluster, AGENT)
    record_property("seconds_to_a_node", round(time.monotonic() - began, 1))
    block = only_block(cluster)
    assert answer["block"] == block.name
    assert answer["run_root"] == str(cluster.layout.run.parent)
    assert answer["umask"] == 0o077
    assert left_of(cluster, block)
    time.sleep(3.0)  # a dozen looks of the monitor
    after = asked(cluster, ASK)
    assert (after["pid"], after["asked"]) == (answer["pid"], 2), "nothing is killed where others fill the node"
    sessions = (*ray_sessions(cluster.layout), *block_folder(cluster.layout.run, block.name).glob("s*_2*"))
    logs = [path for session in sessions for path in session.glob("logs/raylet.out")]
    assert len(logs) >= 2, "one of the head, one of the block"
    assert all("ThresholdMemoryMonitor disabled" in path.read_text() for path in logs)
    began = time.monotonic()
    ended = given_back(cluster)
    record_property("seconds_to_give_back", round(time.monotonic() - began, 1))
    assert ended.phase in GIVEN_BACK
    assert ended.reason is None
    assert left_of(cluster, block) == []
    assert not block_folder(cluster.layout.run, block.name).exists()


def test_one_part_of_the_head_is_killed_and_the_head_leaves_and_comes_back(cluster: LocalCluster) -> None:
    before = asked(cluster, AGENT)
    block = only_block(cluster)
    for part in ("autoscaler/v2/monitor.py", "gcs_server", "ray.scripts.scripts"):  # a raylet: test_service_lifecycle
        cluster.process(part).kill()
        assert cluster.head is not None
        # ray start --head --block notices within seconds: that is the supervisor's sign.
        assert cluster.head.wait(60) != 0, part
        cluster.restart_head()
        assert only_block(cluster).job == block.job, part
    after = asked(cluster, ASK)
    assert (after["pid"], after["asked"]) == (before["pid"], 2), "the same process with the same memory"
    assert given_back(cluster).phase in GIVEN_BACK
    assert left_of(cluster, block) == []
