"""How a real block ends: told to, killed, crashed; and that its recorded engines end with it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gateway_plugin.blocks.ledger import Block, BlockPhase
from gateway_plugin.paths import Layout, block_folder, block_log, private_folder
from gateway_plugin.processes import block_processes
from gateway_plugin.site import load_site
from tests.support.clusters import LocalCluster, command_line, opened, wait_for, write_local_site

pytestmark = pytest.mark.integration

# An agent with two engines in sessions of their own: one that ignores SIGTERM and has a child, one that listens to it.
AGENT = """
import json, os, psutil, subprocess, sys
STUBBORN = ("import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
            "subprocess.Popen(['sleep', '600']); time.sleep(600)")
@ray.remote
class Agent:
    def start(self, records):
        engines = [subprocess.Popen(argv, start_new_session=True)
                   for argv in ([sys.executable, "-c", STUBBORN], ["sleep", "600"])]
        for engine in engines:
            record = {"block": os.environ["RAY_CLOUD_INSTANCE_ID"], "pid": engine.pid,
                      "started": psutil.Process(engine.pid).create_time()}
            with open(f"{records}/{engine.pid}.json", "w") as stream:
                json.dump(record, stream)
        return [engine.pid for engine in engines]
agent = Agent.options(name="agent", lifetime="detached", num_cpus=0, resources={"gateway_local": 1}).remote()
print(json.dumps(ray.get(agent.start.remote(RECORDS))))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """In a state folder whose name needs quoting everywhere."""
    root = Path(tempfile.mkdtemp(prefix="gwt-", dir="/tmp"))
    layout = Layout(private_folder(root / "my 'state $HOME"))
    reference = str(write_local_site(root / "site.py"))
    cluster = LocalCluster(layout, load_site(reference), reference)
    try:
        yield cluster.start()
    finally:
        cluster.stop()
        shutil.rmtree(root)
        shutil.rmtree(layout.run)


@pytest.fixture
def block(cluster: LocalCluster) -> Block:
    """A running block with two engines."""
    # Ray gives an agent to a node that is dead and not yet known to be: wait until it knows.
    alive = "print(sum(node['Alive'] for node in ray.nodes()))"
    wait_for(lambda: cluster.drive(alive) == "1", "Ray to see the last block's end", timeout_s=60)
    engines = json.loads(cluster.drive(AGENT.replace("RECORDS", repr(str(cluster.layout.engine_records)))))
    assert len(engines) == len(list(cluster.layout.engine_records.iterdir())) == 2
    (block,) = cluster.blocks()
    assert len(left_of(cluster, block)) > 5
    return block


def left_of(cluster: LocalCluster, block: Block) -> list[psutil.Process]:
    return opened(block_processes(block.name, block_folder(cluster.layout.run, block.name)))


def ended(cluster: LocalCluster, block: Block) -> Block:
    def end() -> Block | None:
        return next((b for b in cluster.blocks(ended=True) if b.name == block.name and b.phase.ended), None)

    found: Block = wait_for(end, f"{block.name}'s end", timeout_s=60)
    return found


def nothing_is_left(cluster: LocalCluster, block: Block) -> None:
    assert left_of(cluster, block) == []
    assert list(cluster.layout.engine_records.iterdir()) == []


def test_a_crashed_raylet_ends_the_block_as_failed(cluster: LocalCluster, block: Block) -> None:
    (raylet,) = [process for process in left_of(cluster, block) if "raylet/raylet" in command_line(process)]
    raylet.kill()
    end = ended(cluster, block)
    # Ray may have seen it first and cancelled what was left of the block; how its job ended is kept all the same.
    assert end.phase in (BlockPhase.FAILED, BlockPhase.CANCELLED)
    assert end.reason is not None
    assert "exit code 1" in end.reason
    nothing_is_left(cluster, block)
    assert not block_folder(cluster.layout.run, block.name).exists()


def test_a_killed_script_takes_everything_with_it(cluster: LocalCluster, block: Block) -> None:
    assert block.job is not None
    keeper = psutil.Process(block.job.pid)
    shells = [*keeper.children(), keeper]
    for process in shells:
        process.suspend()
    for process in shells:
        process.kill()
    assert ended(cluster, block).phase is BlockPhase.LOST
    nothing_is_left(cluster, block)


def test_down_ends_head_block_and_engines_without_an_autoscaler(cluster: LocalCluster, block: Block) -> None:
    cluster.stop()
    assert ended(cluster, block).phase is BlockPhase.CANCELLED
    nothing_is_left(cluster, block)
    assert not block_folder(cluster.layout.run, block.name).exists()
    assert cluster.head_processes() == []
    token = cluster.layout.ray_token.read_text()
    for path in (block_log(cluster.layout, block.name), *cluster.layout.run.glob("scripts/*")):
        assert token not in path.read_text()
    assert (cluster.layout.run / "scripts").stat().st_mode & 0o077 == 0
    assert block_log(cluster.layout, block.name).stat().st_mode & 0o077 == 0
