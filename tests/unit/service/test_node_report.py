"""A node's report of itself, and what it means."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider

from gateway_plugin.blocks.job_script import block_script
from gateway_plugin.blocks.self_check import call
from gateway_plugin.doctor.node_report import Report, judged
from gateway_plugin.paths import Layout
from gateway_plugin.runtimes.versions import Seen
from gateway_plugin.service.checks import Verdict
from gateway_plugin.site import NodeType
from tests.support.agents import eventually

HERE = {"python": "3.11.7", "ray": "2.60.0"}
GOOD = Report(
    host="n1",
    time_s=1000.0,
    python="3.11.7",
    packages={"ray": "2.60.0", "gateway-plugin": "0.1", "cryptography": "46.0", "vllm": "missing"},
    head="reached",
    address="10.0.0.1",
    port=4000,
    cpus=64,
    memory_mib=256 * 1024,
    visible_gpus="0,1,2,3",
    gpu_mib=[40960] * 4,
    isolation="works",
)
TYPE = NodeType(
    name="big",
    provider=SlurmProvider(launcher=SimpleLauncher()),
    cpus=64,
    gpus=4,
    gpu_memory_gib=38.0,
    engine_memory_gib=100.0,
)


def test_a_good_node_has_nothing_to_complain_of() -> None:
    assert {check.verdict for check in judged(TYPE, GOOD, HERE, "reached", 1000.0)} == {Verdict.OK}


@pytest.mark.parametrize(
    ("change", "what", "verdict", "said"),
    [
        ({"python": "3.12.1"}, "versions", Verdict.FAIL, "python 3.12.1 on n1, 3.11.7 here"),
        ({"packages": {**GOOD.packages, "ray": "2.59.0"}}, "versions", Verdict.FAIL, "ray 2.59.0 on n1"),
        ({"packages": {"ray": "missing"}}, "versions", Verdict.FAIL, "no ray for python 3.11.7 on n1"),
        ({"packages": {"ray": "2.60.0", "gateway-plugin": "0.1"}}, "versions", Verdict.FAIL, "no cryptography for"),
        ({"head": "timed out"}, "network", Verdict.FAIL, "n1 does not reach the head: timed out"),
        ({"visible_gpus": "0,1"}, "GPUs", Verdict.FAIL, "2 on n1, 4 expected"),
        ({"gpu_mib": [], "visible_gpus": ""}, "GPUs", Verdict.FAIL, "0 on n1, 4 expected"),
        ({"gpu_mib": []}, "GPUs", Verdict.WARN, "no nvidia-smi on n1"),
        ({"gpu_mib": [24576] * 4}, "GPUs", Verdict.FAIL, "24.0 GiB each on n1, and engines may use 38.0"),
        ({"memory_mib": 64 * 1024}, "size", Verdict.FAIL, "64 cores and 64 GiB for the job on n1"),
        ({"cpus": 1}, "size", Verdict.WARN, "1 cores"),
        (
            {"isolation": "bwrap: no user namespace"},
            "engine isolation",
            Verdict.WARN,
            "n1 would read what you read: bwrap",
        ),
        ({"time_s": 1100.0}, "clock", Verdict.WARN, "n1 is 100 s ahead"),
    ],
)
def test_each_trouble_is_named(change: dict[str, Any], what: str, verdict: Verdict, said: str) -> None:
    checks = judged(TYPE, GOOD.model_copy(update=change), HERE, "reached", 1000.0)
    (check,) = [check for check in checks if check.verdict is not Verdict.OK]
    assert (check.name, check.verdict) == (f"big: {what}", verdict)
    assert said in check.found


def test_a_node_that_cannot_be_called_is_no_node() -> None:
    (check,) = [c for c in judged(TYPE, GOOD, HERE, "timed out", 1000.0) if c.verdict is not Verdict.OK]
    assert check.found == "n1 (10.0.0.1) cannot be called from here: timed out"


@pytest.mark.process
def test_a_blocks_script_looks_at_its_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    layout, file = Layout(tmp_path / "state"), tmp_path / "report"
    layout.make()
    init = f"export PATH={Path(sys.executable).parent}:$PATH CUDA_VISIBLE_DEVICES=0,1"
    node_type = TYPE.model_copy(update={"worker_init": init})
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        script = block_script("gwtrial-big-0", node_type, layout, address, report=str(file))
        process = subprocess.Popen(["bash", "-c", script])
        assert eventually(file.exists, 30)
        report = Report.model_validate_json(file.read_bytes())
        assert process.poll() is None, "it waits to be called"
        assert call(report.address, report.port) == "reached"
        assert process.wait(10) == 0
    assert (report.head, report.address, report.visible_gpus) == ("reached", "127.0.0.1", "0,1")
    assert report.packages["ray"] != "missing"
    assert report.isolation
    assert file.stat().st_mode & 0o777 == 0o600
    assert not list(layout.run.glob("b-*"))


def test_runtimes_are_told_with_their_versions_and_problems() -> None:
    good = Seen(versions={"python": "3.12.3", "vllm": "0.32.0", "torch": "2.11.0", "torch for cuda": "12.8"})
    newer = Seen(versions={"vllm": "0.40.0", "torch for cuda": "13.0"})
    runtimes = {"": good, "next": newer, "box": Seen(problem="there is no image /sw/vllm.sif on this node")}
    report = GOOD.model_copy(update={"runtimes": runtimes, "cuda": "12.8", "gpus": ["NVIDIA A100, 570.1"] * 4})
    found = {check.name: check for check in judged(TYPE, report, HERE, "reached", 1000.0)}
    own = found["big: engines without a runtime"]
    assert (own.verdict, own.found) == (Verdict.OK, "python 3.12.3, vllm 0.32.0, torch 2.11.0, torch for cuda 12.8")
    assert found["big: runtime next"].verdict is Verdict.WARN
    assert "knows CUDA up to 12.8" in found["big: runtime next"].found
    assert found["big: runtime box"].verdict is Verdict.FAIL
    assert found["big: runtime box"].found == "there is no image /sw/vllm.sif on this node (on n1)"
    assert found["big: GPUs"].found.endswith("; NVIDIA A100, 570.1, CUDA 12.8")
