"""``gateway doctor --site`` on a stand-in for PBS."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from parsl.launchers import SimpleLauncher
from parsl.providers import PBSProProvider

from gateway_plugin.doctor.node_probe import try_nodes
from gateway_plugin.doctor.scheduler import every_site_check
from gateway_plugin.paths import Layout
from gateway_plugin.service.checks import Check, Verdict
from gateway_plugin.site import NodeType, Site
from tests.support.pbs.virtual import VirtualPbs
from tests.support.ports import free_port

OURS = f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={Path(__file__).parents[2]}"


def site(worker_init: str = OURS, **options: Any) -> Site:
    provider = PBSProProvider(**{"launcher": SimpleLauncher(), "queue": "workq", "walltime": "12:00:00", **options})
    kind = NodeType(name="big", provider=provider, cpus=1, engine_memory_gib=1.0, worker_init=worker_init)
    ports = [free_port() for _ in range(2)]
    return Site(name="here", port=ports[0], ray_port=ports[1], node_types=(kind,))


def named(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_a_good_site_passes_and_its_node_is_looked_at(pbs: VirtualPbs, layout: Layout) -> None:
    checks = named(every_site_check(layout, site()))
    assert not [check for check in checks.values() if check.verdict is Verdict.FAIL]
    assert checks["big: queue"].found == "workq takes jobs"
    assert checks["big: walltime"].found == "12:00:00; workq allows 24:00:00"
    assert checks["big: account"].verdict is Verdict.WARN
    tried = named(try_nodes(layout, site(), wait_s=30))
    assert tried["big: trial job"].verdict is Verdict.OK
    assert tried["big: state folder"].verdict is Verdict.OK
    assert {job["job_state"] for job in pbs.jobs().values()} == {"F"}
    assert pbs.jobs()["1"]["Resource_List"]["walltime"] == "00:05:00"
    assert list(layout.block_scripts.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "what", "said"),
    [
        ({"queue": "nope"}, "queue", "nope: qstat: qstat: Unknown queue nope"),
        ({"queue": "prod"}, "queue", "prod takes jobs of 10 nodes and more, and a block is one node"),
        ({"walltime": "48:00:00"}, "walltime", "48:00:00; workq takes any to 24:00:00"),
    ],
)
def test_each_mistake_is_named(pbs: VirtualPbs, layout: Layout, options: dict[str, Any], what: str, said: str) -> None:
    (wrong,) = [check for check in every_site_check(layout, site(**options)) if check.verdict is Verdict.FAIL]
    assert (wrong.name, wrong.found) == (f"big: {what}", said)
    assert wrong.advice


def test_a_queue_that_is_closed_is_a_warning(pbs: VirtualPbs, layout: Layout) -> None:
    pbs.set(queues={"workq": {"walltime": "24:00:00", "nodes": 1, "enabled": False}})
    assert named(every_site_check(layout, site()))["big: queue"].found == "workq is not enabled"


def test_without_its_commands_there_is_no_pbs(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert named(every_site_check(layout, site()))["commands of PBS"].found == "no qsub, qstat, qdel, qselect"
