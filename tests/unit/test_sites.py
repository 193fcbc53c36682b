"""Every site in ``parsl_configs``: it loads, its jobs can be written, and Ray takes its autoscaler file."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from parsl.launchers import SimpleLauncher
from parsl.providers import GridEngineProvider, PBSProProvider, SlurmProvider
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

import parsl_configs
from gateway_plugin.blocks.cluster_yaml import cluster_yaml
from gateway_plugin.blocks.job_script import block_script
from gateway_plugin.errors import ConfigError
from gateway_plugin.paths import Layout
from gateway_plugin.schedulers.select import scheduler_for
from gateway_plugin.service.dry_run import rehearsed
from gateway_plugin.site import NodeType, Site, load_site
from tests.support.queue import QueueProvider, Scheduler

pytestmark = pytest.mark.process

SITES = sorted(module.name for module in pkgutil.iter_modules(parsl_configs.__path__))
HEAD = "10.0.0.1:6390"
LONGEST_H = {"gpuA40x4": 48, "gpuA100x4": 48, "gpuA100x8": 48, "regular": 48, "preemptable": 72, "capacity": 168}
"""As the centres' documents have it."""


def load(name: str, monkeypatch: pytest.MonkeyPatch, account: str | None = "m1234_g") -> Site:
    """Afresh: a site reads the environment when it is imported."""
    if account is None:
        monkeypatch.delenv("GATEWAY_ACCOUNT", raising=False)
    else:
        monkeypatch.setenv("GATEWAY_ACCOUNT", account)
    sys.modules.pop(f"parsl_configs.{name}", None)
    importlib.invalidate_caches()
    return load_site(name)


def test_all_of_them_are_here() -> None:
    assert set(SITES) >= {"local", "slurm_example", "delta", "perlmutter", "polaris"}


@pytest.mark.parametrize("name", SITES)
def test_its_job_scripts_are_whole(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site, layout = load(name, monkeypatch), Layout(tmp_path)
    assert site.name == name
    for node_type in site.node_types:
        block = f"gw-{node_type.name}-0123abcd"
        script = block_script(block, node_type, layout, HEAD)
        job = rehearsed(node_type, block, script, layout)
        subprocess.run(["bash", "-n"], input=job.text, text=True, check=True)
        assert script in job.text
        assert f"--num-gpus={node_type.gpus}" in job.text
        # one of each, and every directive before the first command: a scheduler reads no further
        directives = [line for line in job.text.splitlines() if line.startswith(("#SBATCH", "#PBS"))]
        keys = [re.split(r"[= ]", line.split(maxsplit=1)[1])[0] for line in directives if not line.startswith("#PBS")]
        assert len(keys) == len(set(keys)), directives
        if not directives:
            assert name == "local"
            continue
        head = job.text[: job.text.index(directives[-1])]
        assert all(line.startswith("#") or not line.strip() for line in head.splitlines())
        whole = f"{job.command}\n{job.text}"
        assert "m1234_g" in whole
        provider = node_type.provider
        queue = provider.queue if isinstance(provider, PBSProProvider) else provider.partition or provider.qos
        assert queue in whole
        assert f"gpus-per-node={node_type.gpus}" in whole or f"ngpus={node_type.gpus}" in whole or not node_type.gpus
        hours, minutes, _seconds = map(int, provider.walltime.split(":"))
        assert hours <= LONGEST_H.get(queue, 48)
        minutes += hours * 60
        assert f"--time={minutes}" in whole or f"walltime={hours:02}:" in whole
        assert not list(tmp_path.iterdir()), "a rehearsal leaves nothing behind"


@pytest.mark.parametrize("name", SITES)
def test_ray_takes_its_autoscaler_file(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site = load(name, monkeypatch)
    document = yaml.safe_load(yaml.safe_dump(cluster_yaml(site, name, Layout(tmp_path), HEAD)))
    config = AutoscalingConfig(document, skip_content_hash=True)
    shapes = config.get_node_type_configs()
    for node_type in site.node_types:
        assert shapes[node_type.name].max_worker_nodes == node_type.max_blocks == node_type.provider.max_blocks
        assert shapes[node_type.name].resources["GPU"] == node_type.gpus


@pytest.mark.parametrize("name", [site for site in SITES if site != "local"])
def test_it_loads_without_an_account_and_says_so_when_jobs_are_to_be_submitted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = load(name, monkeypatch, account=None)
    with pytest.raises(ConfigError, match=f"site {name}.*GATEWAY_ACCOUNT"):
        site.demand_environment({"GATEWAY_ACCOUNT": ""})
    site.demand_environment({"GATEWAY_ACCOUNT": "m1234"})


def test_the_rehearsal_is_what_parsl_submits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    for command, said in (("sbatch", "Submitted batch job 17"), ("sacct", "")):
        program = tmp_path / "bin" / command
        program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\necho "{said}"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    provider = SlurmProvider(partition="p", mem_per_node=3, cores_per_node=8, launcher=SimpleLauncher())
    node_type = NodeType(name="gpu", provider=provider, cpus=8, gpus=4, gpu_memory_gib=38.0)
    asked_before = (tmp_path / "asked").read_text()
    layout = Layout(tmp_path / "state")
    job = rehearsed(node_type, "gw-gpu-0", "echo $FOO '${BAR}'\n", layout)
    assert not layout.state.exists()
    assert (tmp_path / "asked").read_text() == asked_before, "nothing was submitted"
    assert provider.resources == {}
    assert provider.script_dir is None
    layout.make()
    assert scheduler_for(provider, layout).submit("gw-gpu-0", "echo $FOO '${BAR}'\n").id == "17"
    submitted = next(path for path in layout.block_scripts.iterdir())
    assert "--no-requeue" in job.text

    def at_no_time(text: str) -> str:  # Parsl puts the time into the job's name
        return re.sub(r"gw-gpu-0\.[0-9.]+[0-9]", "gw-gpu-0.T", text)

    assert at_no_time(job.text) == at_no_time(submitted.read_text())
    assert at_no_time(job.command) == at_no_time(f"sbatch {submitted}")


def test_what_up_refuses_is_not_rehearsed_either(tmp_path: Path) -> None:
    slurm = SlurmProvider(partition="p", launcher=SimpleLauncher())
    with pytest.raises(ConfigError, match=r"expected a state folder .* without blanks"):
        rehearsed(a_gpu_node(slurm), "gw-gpu-0", "true\n", Layout(tmp_path / "my state"))
    with pytest.raises(ConfigError, match="GridEngineProvider: blocks of this Parsl provider cannot be found again"):
        rehearsed(a_gpu_node(GridEngineProvider()), "gw-gpu-0", "true\n", Layout(tmp_path))
    with pytest.raises(ConfigError, match=r"walltime='1-00:00:00'.*'24:00:00'"):
        days = SlurmProvider(partition="p", walltime="1-00:00:00", launcher=SimpleLauncher())
        rehearsed(a_gpu_node(days), "gw-gpu-0", "true\n", Layout(tmp_path))
    assert not list(tmp_path.iterdir())


def a_gpu_node(provider: Any) -> NodeType:
    return NodeType(name="gpu", provider=provider, cpus=8, gpus=4, gpu_memory_gib=38.0)


def test_a_block_on_this_machine_or_of_a_site_s_own_provider_is_its_script_alone(tmp_path: Path) -> None:
    node_type = NodeType(name="own", provider=QueueProvider(Scheduler()), cpus=1, engine_memory_gib=1)
    job = rehearsed(node_type, "gw-own-0", "true\n", Layout(tmp_path))
    assert (job.command, job.text) == ("", "true\n")
