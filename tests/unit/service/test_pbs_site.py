"""What a node type asks of a PBS queue, against what the queue takes."""

from __future__ import annotations

import pytest
from parsl.launchers import SimpleLauncher
from parsl.providers import PBSProProvider

from gateway_plugin.doctor.pbs import judged, queue_of
from gateway_plugin.service.checks import Verdict
from gateway_plugin.site import NodeType


@pytest.mark.parametrize(
    ("walltime", "verdict", "said"),
    [
        ("12:00:00", Verdict.OK, "12:00:00; main allows 24:00:00"),
        ("48:00:00", Verdict.FAIL, "48:00:00; main takes any to 24:00:00"),
        (
            "1-00:00:00",
            Verdict.FAIL,
            "'1-00:00:00': expected hours, minutes and seconds: '24:00:00'",
        ),
    ],
)
def test_a_walltime_is_one_that_parsl_and_the_queue_take(walltime: str, verdict: Verdict, said: str) -> None:
    provider = PBSProProvider(queue="main", walltime=walltime, launcher=SimpleLauncher())
    kind = NodeType(name="big", provider=provider, cpus=1, engine_memory_gib=1)
    checks = {check.name: check for check in judged(kind, {"resources_max": {"walltime": "24:00:00"}})}
    assert checks["big: walltime"].verdict is verdict
    assert said in checks["big: walltime"].found


def test_queue_and_account_may_be_said_in_the_options() -> None:
    options = "#PBS -q main -A mine"
    provider = PBSProProvider(scheduler_options=options, walltime="01:00:00", launcher=SimpleLauncher())
    assert queue_of(provider) == "main"
    assert queue_of(PBSProProvider(queue="own", scheduler_options=options)) == "own"
    kind = NodeType(name="big", provider=provider, cpus=1, engine_memory_gib=1)
    checks = {check.name: check.found for check in judged(kind, {})}
    assert checks["big: queue"] == "main takes jobs"
    assert checks["big: account"].startswith("mine, ")
