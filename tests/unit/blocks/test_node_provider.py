"""What Ray's autoscaler is told, over a queue."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider, PBSProProvider, SlurmProvider
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from gateway_plugin.blocks import node_provider
from gateway_plugin.blocks.ledger import BlockPhase, Ledger
from gateway_plugin.blocks.node_provider import ParslNodeProvider
from gateway_plugin.errors import ConfigError, ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.schedulers.base import walltime_s
from gateway_plugin.schedulers.select import scheduler_for
from tests.support.queue import Scheduler

SITE = """
from gateway_plugin.site import NodeType, Site
from tests.support.queue import QueueProvider
from tests.unit.blocks import test_node_provider

site = Site(
    name="queue",
    node_types=(
        NodeType(
            name="gpu", provider=QueueProvider(test_node_provider.SCHEDULER), cpus=2, engine_memory_gib=1, max_blocks=2
        ),
    ),
)
"""
SCHEDULER = Scheduler()
TAGS = {TAG_RAY_USER_NODE_TYPE: "gpu", TAG_RAY_NODE_KIND: NODE_KIND_WORKER, "ray-launch-request": "r1"}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    SCHEDULER.__init__()  # type: ignore[misc]
    (tmp_path / "site.py").write_text(SITE)
    return {"site": str(tmp_path / "site.py"), "state": str(tmp_path / "state"), "head_address": "10.0.0.1:6390"}


def test_the_life_of_a_block_as_ray_sees_it(config: dict[str, str]) -> None:
    provider = ParslNodeProvider(config, "queue")
    assert provider.non_terminated_nodes({}) == ["head"]
    provider.create_node_with_resources_and_labels({}, TAGS, 1, {"CPU": 2}, {})
    _, name = provider.non_terminated_nodes({})
    assert not provider.is_running(name)
    assert provider.node_tags(name)["ray-launch-request"] == "r1"  # how v2 knows which request this answers
    assert provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_WORKER}) == [name]
    SCHEDULER.move(name, BlockPhase.RUNNING)
    provider.non_terminated_nodes({})
    assert provider.is_running(name)
    ((job_name, _),) = SCHEDULER.jobs.values()
    assert job_name == name  # the instance id: found again in the queue
    provider.terminate_nodes(["head", name])
    provider.non_terminated_nodes({})
    provider.non_terminated_nodes({})
    assert provider.is_terminated(name)
    assert provider.non_terminated_nodes({}) == ["head"]
    assert not provider.is_terminated("head")


def test_after_a_restart_the_same_blocks_are_there(config: dict[str, str]) -> None:
    first = ParslNodeProvider(config, "queue")
    first.create_node({}, TAGS, 2)
    names = first.non_terminated_nodes({})
    second = ParslNodeProvider(config, "queue")
    assert second.non_terminated_nodes({}) == names
    assert second.node_tags(names[1])[TAG_RAY_USER_NODE_TYPE] == "gpu"
    assert SCHEDULER.submits == 2
    with pytest.raises(ServiceError, match="no more than 2"):
        second.create_node({}, TAGS, 1)


def test_an_unknown_node_is_terminated_and_has_no_tags(config: dict[str, str]) -> None:
    provider = ParslNodeProvider(config, "queue")
    assert provider.is_terminated("gw-gpu-none")
    assert not provider.is_running("gw-gpu-none")
    assert provider.node_tags("gw-gpu-none") == {}
    with pytest.raises(ConfigError, match="no node type"):
        provider.create_node({}, {TAG_RAY_USER_NODE_TYPE: "tpu"}, 1)


def test_tags_are_kept_in_the_ledger(config: dict[str, str]) -> None:
    provider = ParslNodeProvider(config, "queue")
    provider.create_node({}, TAGS, 1)
    _, name = provider.non_terminated_nodes({})
    provider.set_node_tags(name, {"color": "blue"})
    provider.set_node_tags("head", {"color": "red"})
    assert Ledger(Layout(Path(config["state"])).ledger).read()[name].tags["color"] == "blue"
    assert provider.non_terminated_nodes({"color": "red"}) == ["head"]


@pytest.mark.process
def test_the_walltime_of_a_job_is_what_its_provider_asks_for() -> None:
    launcher = SimpleLauncher()
    assert walltime_s(SlurmProvider(launcher=launcher, walltime="02:30:00")) == 9000
    assert walltime_s(PBSProProvider(launcher=launcher, walltime="00:10:00")) == 600
    assert walltime_s(LocalProvider(launcher=launcher)) is None
    assert walltime_s(object()) is None


@pytest.mark.process
@pytest.mark.parametrize(
    ("walltime", "example"),
    [("2h", "02:00:00"), ("2-00:00:00", "48:00:00"), ("1-12", "36:00:00"), ("30:00", "02:00:00"),
     ("-1:00:00", "02:00:00")],
)  # fmt: skip
def test_a_walltime_that_parsl_would_stumble_over_is_refused_where_jobs_are_asked_for(
    walltime: str, example: str, tmp_path: Path
) -> None:
    """Slurm's own form for days is one: Parsl raises a ValueError in the middle of a submit."""
    provider = SlurmProvider(launcher=SimpleLauncher(), walltime=walltime)
    words = re.escape(f"SlurmProvider: walltime={walltime!r}: expected hours, minutes and seconds")
    with pytest.raises(ConfigError, match=f"{words}.*'{example}'"):
        scheduler_for(provider, Layout(tmp_path))


@pytest.mark.process
def test_less_than_a_minute_which_slurm_would_take_for_no_limit_at_all_is_refused(tmp_path: Path) -> None:
    provider = SlurmProvider(launcher=SimpleLauncher(), walltime="00:00:30")
    with pytest.raises(ConfigError, match=r"walltime='00:00:30': .* expected a minute or more"):
        scheduler_for(provider, Layout(tmp_path))


def test_what_hinders_a_block_before_there_is_a_job_is_in_the_ledger_and_backs_off(
    config: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's monitor only logs what ``create_node`` raises, and asks again two seconds later."""
    provider = ParslNodeProvider(config, "queue")

    def no_room(*arguments: Any) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(node_provider, "script_for", no_room)
        with pytest.raises(OSError, match="No space left"):
            provider.create_node({}, TAGS, 1)
        with pytest.raises(ServiceError, match="has just failed; the next can be submitted in 10 s"):
            provider.create_node({}, TAGS, 1)
    blocks = Ledger(Layout(Path(config["state"])).ledger).read().values()
    assert [(block.type, block.phase, block.job) for block in blocks] == [("gpu", BlockPhase.FAILED, None)]
    assert {block.reason for block in blocks} == {
        "its job could not be written: OSError: [Errno 28] No space left on device"
    }
    assert SCHEDULER.submits == 0
