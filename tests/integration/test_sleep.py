"""Two models take turns on one GPU of a whole gateway: neither is loaded twice, also when the agent dies meanwhile.

The GPU is declared only: ``nvidia-smi`` on the block's PATH reports what the fake engines hold.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway_plugin.processes import arguments
from tests.support.fake_memory import held_mib
from tests.support.fake_sleep import KEPT_MIB
from tests.support.gateways import ROOT, Gateway, fake_model, gateway_of, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.process]

MEMORY_MIB = 1024
SITE = """
from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider
from gateway_plugin.site import NodeType, Site

site = Site(
    name="test", port={port}, ray_port={ray_port},
    node_types=(NodeType(
        name="gpu",
        provider=LocalProvider(launcher=SimpleLauncher(), init_blocks=0, min_blocks=0, max_blocks=1),
        cpus=2, gpus=1, gpu_memory_gib=1.5, sleep_memory_gib=2, max_blocks=1, engines_on_loopback=True,
        worker_init="export PATH={programs}:$PATH",
    ),),
)
"""
NVIDIA_SMI = """#!{python}
import sys
from pathlib import Path
sys.path.insert(0, "{root}")
from tests.support.fake_memory import held_mib
print(held_mib(Path("{memory}")) if "memory.used" in " ".join(sys.argv) else 2048)
"""


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Gateway]:
    programs = tmp_path / "bin"
    programs.mkdir()

    def site(port: int, ray_port: int) -> str:
        return SITE.format(port=port, ray_port=ray_port, programs=programs)

    def models(memory: Path) -> dict[str, Any]:
        program = programs / "nvidia-smi"
        program.write_text(NVIDIA_SMI.format(python=sys.executable, root=ROOT, memory=memory))
        program.chmod(0o755)
        return {name: fake_model(memory, "--enable-sleep-mode", gpus=1, sleep=True) for name in ("a", "b")}

    with gateway_of(site, models) as made:
        yield made


def states(running: Gateway) -> dict[str, str]:
    return {engine["model"]: engine["state"] for engine in running.status()["engines"]}


def agent_of(running: Gateway) -> psutil.Process:
    (found,) = [p for p in running.processes() if any("RayNodeAgent" in word for word in arguments(p.pid)[:1])]
    return found


def test_models_take_turns_and_wake_and_an_agent_made_again_finds_them_asleep(running: Gateway) -> None:
    memory = running.folder / "memory"
    for model in ("a", "b"):
        assert running.chat(model).status_code == 200
    pids = running.engine_pids()
    assert states(running) == {"a": "asleep", "b": "ready"}
    assert held_mib(memory) == MEMORY_MIB + KEPT_MIB
    (shown,) = [model for model in running.status()["models"] if model["id"] == "a"]
    assert (shown["state"], shown["eta_s"] is not None) == ("asleep", True)

    assert running.chat("a").status_code == 200, "woken"
    assert states(running) == {"a": "ready", "b": "asleep"}

    agent = agent_of(running)
    agent.kill()
    agent.wait(20)
    wait_for(lambda: states(running) == {"a": "ready", "b": "asleep"}, 60, lambda: str(running.status()["engines"]))
    assert running.chat("b").status_code == 200
    assert running.engine_pids() == pids, "no engine was loaded again"
    with running.client() as client:
        metrics = client.get("/metrics").text
    assert 'gateway_wake_seconds_count{model="b"} 1.0' in metrics
    assert "gateway_sleep_doubts_total{" not in metrics
