"""``gateway doctor --site`` on a real Slurm: a good site passes, each mistake is named, trial jobs leave nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway_plugin.paths import Layout
from tests.support.clusters import wait_for
from tests.support.ports import free_port
from tests.support.slurm.virtual import VirtualSlurm

pytestmark = pytest.mark.slurm

SITE = """
from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider
from gateway_plugin.site import NodeType, Site

site = Site(
    name="virtual",
    head_address={head!r},
    port={ports[0]},
    ray_port={ports[1]},
    node_types=(
        NodeType(
            name="gpu",
            provider=SlurmProvider(**{{**dict(
                partition="debug", account="proj", qos="normal", launcher=SimpleLauncher(), exclusive=False,
                gpus_per_node=2, cores_per_node=2, walltime="00:30:00",
            ), **{options!r}}}),
            cpus=2,
            gpus=2,
            gpu_memory_gib=1.0,
            worker_init={worker_init!r},
        ),
    ),
)
"""
GATEWAY = (sys.executable, "-m", "gateway_plugin.cli.main")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gwt-", dir="/tmp") as place:
        yield Path(place)


class Doctor:
    def __init__(self, slurm: VirtualSlurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.state = folder / "state"

    def command(self, *words: str, worker_init: str | None = None, **options: Any) -> list[str]:
        site = self.folder / "site.py"
        ports = [free_port() for _ in range(2)]
        init = f"export PATH={Path(sys.executable).parent}:$PATH" if worker_init is None else worker_init
        site.write_text(SITE.format(head=self.slurm.places.gateway, ports=ports, options=options, worker_init=init))
        return [*GATEWAY, "--state", str(self.state), "doctor", "--site", str(site), "--json", *words]

    def says(self, *words: str, code: int = 0, env: dict[str, str] | None = None, **site: Any) -> dict[str, Any]:
        """The checks by name."""
        done = subprocess.run(
            self.command(*words, **site), env={**self.slurm.env(), **(env or {})}, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return {check["name"]: check for check in json.loads(done.stdout)}


@pytest.fixture
def doctor(slurm: VirtualSlurm, folder: Path) -> Doctor:
    return Doctor(slurm, folder)


def test_a_good_site_passes_and_its_node_is_looked_at(slurm: VirtualSlurm, doctor: Doctor) -> None:
    checks = doctor.says("--submit")
    assert not [check for check in checks.values() if check["verdict"] == "fail"]
    assert checks["gpu: job"]["found"].endswith("in partition debug")
    assert checks["gpu: walltime"]["found"] == "00:30:00; partition debug allows 01:00:00"
    assert checks["gpu: nodes up"]["found"] == "2 of 2 nodes of partition debug can take jobs"
    assert checks["gpu: trial job"]["found"].startswith("ran on n")
    looked = ("state folder", "versions", "network", "size", "clock")
    assert {checks[f"gpu: {what}"]["verdict"] for what in looked} == {"ok"}
    assert slurm.places.network in checks["gpu: network"]["found"]  # its own address, not this machine's
    assert checks["gpu: GPUs"]["verdict"] == "warn"  # two were given, and there is no nvidia-smi
    assert checks["gpu: GPUs"]["found"].startswith("2; no nvidia-smi")
    assert slurm.run("squeue", "-h") == ""
    assert not doctor.state.exists()


MODELS = """
runtimes:
  own: {{python: {python}}}
  bare: {{python: {folder}/bare/bin/python}}
  gone: {{container: {{kind: apptainer, image: /sw/none.sif}}}}
models:
  a: {{source: org/a@0f3c, memory_gib: 1, runtime: own}}
  b: {{source: org/b@0f3c, memory_gib: 1, runtime: bare}}
  c: {{source: org/c@0f3c, memory_gib: 1, runtime: gone}}
"""


def test_the_runtimes_of_a_catalog_are_tried_on_a_node(slurm: VirtualSlurm, doctor: Doctor, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "bare"], check=True)
    models = folder / "models.yaml"
    models.write_text(MODELS.format(python=sys.executable, folder=folder))
    checks = doctor.says("--submit", "--models", str(models), code=1)
    assert checks["runtime own"]["verdict"] == "ok"
    assert checks["runtime gone"]["verdict"] == "warn"  # here; a node may have it
    assert checks["gpu: runtime own"]["verdict"] == "ok", checks["gpu: runtime own"]["found"]
    assert "vllm " in checks["gpu: runtime own"]["found"]
    assert checks["gpu: runtime bare"]["verdict"] == checks["gpu: runtime gone"]["verdict"] == "fail"
    assert "has no vllm" in checks["gpu: runtime bare"]["found"]
    assert "there is no apptainer on PATH" in checks["gpu: runtime gone"]["found"]
    assert not doctor.state.exists()


@pytest.mark.parametrize(
    ("options", "check", "said"),
    [
        ({"partition": "gpus"}, "partition", "invalid partition specified: gpus (--partition=gpus)"),
        ({"partition": "short"}, "walltime", "00:30:00 is more than partition short allows (00:05:00)"),
        ({"walltime": "02:00:00"}, "walltime", "02:00:00 is more than partition debug allows (01:00:00)"),
        (
            {"account": "theirs"},
            "account",
            "Invalid account or account/partition combination specified",
        ),
        ({"qos": "gold"}, "qos", "Invalid qos specification (--qos=gold --account=proj)"),
        (
            {"gpus_per_node": 7},
            "nodes",
            "Requested node configuration is not available (--partition=debug --gpus-",
        ),
        ({"cores_per_node": 64}, "nodes", "Requested node configuration is not available"),
        ({"constraint": "h100"}, "nodes", "Invalid feature specification (--partition=debug --constraint=h100"),
        ({"scheduler_options": "#SBATCH --licenses=nope"}, "job", "Invalid license specification"),
        ({"mem_per_node": 64}, "nodes", "Requested node configuration is not available"),
    ],
)
def test_each_mistake_is_named_and_nothing_is_submitted(
    slurm: VirtualSlurm, doctor: Doctor, options: dict[str, Any], check: str, said: str
) -> None:
    before = set(slurm.run("squeue", "-h", "-t", "all", "-o", "%A").split())
    checks = doctor.says("--submit", code=1, **options)
    (wrong,) = [found for found in checks.values() if found["verdict"] == "fail"]
    assert wrong["name"] == f"gpu: {check}"
    assert wrong["found"].startswith(said)
    assert wrong["advice"]
    assert checks["trial jobs"]["found"] == f"not submitted: gpu: {check} first"
    after = set(slurm.run("squeue", "-h", "-t", "all", "-o", "%A").split())
    assert after <= before  # Slurm forgets those of earlier tests meanwhile


def test_a_missing_command_and_a_controller_that_is_away(slurm: VirtualSlurm, doctor: Doctor, folder: Path) -> None:
    tools = folder / "bin"
    tools.mkdir()
    for command in ("sbatch", "squeue", "sh", "uname"):
        (tools / command).symlink_to(f"/usr/bin/{command}")
    checks = doctor.says(code=1, env={"PATH": str(tools)})
    assert checks["commands of Slurm"]["found"] == "no scontrol, scancel, sinfo"
    slurm.stop_controller()
    try:
        checks = doctor.says(code=1)
    finally:
        slurm.start_controller()
    assert "Unable to contact slurm controller" in checks["Slurm"]["found"]


def test_a_node_without_its_environment_is_told_with_its_last_words(slurm: VirtualSlurm, doctor: Doctor) -> None:
    checks = doctor.says("--submit", code=1, worker_init="PATH=/nonexistent")
    assert checks["gpu: trial job"]["verdict"] == "fail"
    assert "python: not found" in checks["gpu: trial job"]["found"]
    assert slurm.run("squeue", "-h") == ""


def test_nodes_that_are_away_are_no_mistake_of_the_sites(slurm: VirtualSlurm, doctor: Doctor) -> None:
    # Drained: one that is down comes back by itself when it registers again.
    slurm.run("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test")
    try:
        checks = doctor.says()
    finally:
        slurm.run("scontrol", "update", "nodename=n[1-2]", "state=resume")
    assert checks["gpu: nodes up"]["found"] == "0 of 2 nodes of partition debug can take jobs"
    assert checks["gpu: job"]["verdict"] == "warn"


def test_a_job_that_does_not_start_in_time_is_cancelled_and_said(slurm: VirtualSlurm, doctor: Doctor) -> None:
    checks = doctor.says("--submit", "--wait", "2", scheduler_options="#SBATCH --hold")
    assert checks["gpu: trial job"]["verdict"] == "warn"
    assert checks["gpu: trial job"]["found"] == "did not run within 2 s: JobHeldUser"
    assert slurm.run("squeue", "-h") == ""


def test_ctrl_c_cancels_the_jobs(slurm: VirtualSlurm, doctor: Doctor) -> None:
    command = doctor.command("--submit", scheduler_options="#SBATCH --hold")
    process = subprocess.Popen(command, env=slurm.env(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: slurm.run("squeue", "-h"), "the trial's job", timeout_s=60)
        os.kill(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert slurm.run("squeue", "-h") == ""
    assert not Layout(doctor.state).block_scripts.exists()
