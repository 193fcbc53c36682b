"""``gateway up --dry-run``: prints job scripts, makes, starts and submits nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gateway_plugin.cli.main import cli

pytestmark = pytest.mark.process

SITE = """
import os
from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider, SlurmProvider
from gateway_plugin.site import NodeType, Site
site = Site(
    name="here",
    head_address="127.0.0.1",
    needs_environment=("GATEWAY_ACCOUNT",),
    node_types=(
        NodeType(
            name="gpu",
            provider=SlurmProvider(
                partition="fast", account=os.environ.get("GATEWAY_ACCOUNT"), walltime="02:00:00",
                launcher=SimpleLauncher(), gpus_per_node=4,
            ),
            cpus=8, gpus=4, gpu_memory_gib=38.0,
        ),
        NodeType(name="own", provider=LocalProvider(launcher=SimpleLauncher()), cpus=1, engine_memory_gib=1.0),
    ),
)
"""


def dry_run(folder: Path, *arguments: str) -> Result:
    site = folder / "site.py"
    site.write_text(SITE)
    command = ["--state", str(folder / "state"), "up", "--dry-run", "--site", str(site), *arguments]
    return CliRunner(env={"GATEWAY_URL": "", "GATEWAY_API_KEY": ""}).invoke(cli, command, catch_exceptions=False)


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which a stand-in for ``sbatch`` notes that it was called."""
    (tmp_path / "bin").mkdir()
    note = tmp_path / "submitted"
    program = tmp_path / "bin" / "sbatch"
    program.write_text(f"#!/bin/sh\ntouch {note}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("GATEWAY_ACCOUNT", "abc-gpu")
    return note


def test_it_prints_the_script_of_every_node_type_and_submits_nothing(tmp_path: Path, submitted: Path) -> None:
    done = dry_run(tmp_path)
    assert done.exit_code == 0
    for line in (
        "# ---- node type gpu: sbatch ",
        "#SBATCH --partition=fast",
        "#SBATCH --account=abc-gpu",
        "#SBATCH --time=120",
        "HEAD=127.0.0.1:6390",
        "# ---- node type own: run on this machine",
    ):
        assert line in done.stdout
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
    assert not submitted.exists()
    assert not (tmp_path / "state").exists(), "nothing is made"


def test_as_json_for_programs(tmp_path: Path, submitted: Path) -> None:
    jobs = json.loads(dry_run(tmp_path, "--json").stdout)
    assert [job["node_type"] for job in jobs] == ["gpu", "own"]
    assert jobs[0]["script"].startswith("#!/bin/bash\n")
    assert jobs[0]["block"] in jobs[0]["script"]
    assert jobs[0]["command"].startswith(f"sbatch {tmp_path}/state/")
    assert jobs[1]["command"] == ""
    assert not submitted.exists()


def test_a_missing_account_is_one_line_and_2(tmp_path: Path, submitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GATEWAY_ACCOUNT")
    done = dry_run(tmp_path)
    assert done.exit_code == 2
    assert "GATEWAY_ACCOUNT" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout


def test_a_site_may_be_looked_at_from_a_machine_that_is_not_of_it(
    tmp_path: Path, submitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "parsl_configs.polaris", raising=False)  # it reads the account once
    command = ["--state", str(tmp_path / "state"), "up", "--dry-run", "--site", "polaris"]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert "# ---- node type a100: qsub -q preemptable -A abc-gpu " in done.stdout
    assert "#PBS -l filesystems=home:eagle" in done.stdout
    assert "HEAD=ADDRESS-OF-bond0:6390" in done.stdout
    assert "head_interface: 'bond0' has no IPv4 address on this machine" in done.stderr
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
