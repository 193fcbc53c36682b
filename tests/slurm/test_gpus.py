"""Models over several GPUs of a node, on a whole gateway over a real Slurm whose GPUs are only numbers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.gateways import ROOT, Gateway, gateway_of, wait_for
from tests.support.slurm.gateways import engine_nodes, model_of_a_node, pinned, queued
from tests.support.slurm.virtual import VirtualSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(420)]

GPUS = {"left": 2, "right": 2, "one": 1, "four": 4}
_SITE = """
from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider
from gateway_plugin.site import NodeType, Site

site = Site(
    name="virtual", head_address={head!r}, port={port}, ray_port={ray_port},
    node_types=(NodeType(
        name="gpu",
        provider=SlurmProvider(
            partition="debug", launcher=SimpleLauncher(), exclusive=False, gpus_per_node=4, walltime="00:30:00",
        ),
        cpus=1, gpus=4, gpu_memory_gib=1.0, max_blocks=2, worker_init={worker_init!r},
    ),),
)
"""


@pytest.fixture
def gateway(slurm: VirtualSlurm) -> Iterator[Gateway]:
    def site(port: int, ray_port: int) -> str:
        worker_init = f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}"
        ports = {"port": port, "ray_port": ray_port}
        return _SITE.format(head=slurm.places.gateway, worker_init=worker_init, **ports)

    def catalog(memory: Path) -> dict[str, Any]:
        return {name: model_of_a_node(memory, gpus=gpus, min_residency_s=0) for name, gpus in GPUS.items()}

    with gateway_of(site, catalog, environment=slurm.env()) as made:
        yield made


def devices(gateway: Gateway) -> dict[str, str]:
    """Model -> what its engine's own environment says of its GPUs."""
    engines = {engine["id"]: engine["model"] for engine in gateway.status()["engines"]}
    found = {}
    for engine, pid in gateway.engine_pids().items():
        with suppress(psutil.NoSuchProcess):  # it ends while we look: a zombie has no environment any more
            if engine in engines:
                found[engines[engine]] = psutil.Process(pid).environ()["CUDA_VISIBLE_DEVICES"]
    return found


def test_models_share_a_nodes_gpus_and_fragments_of_two_nodes_are_no_room(
    slurm: VirtualSlurm, gateway: Gateway
) -> None:
    nodes = pinned(gateway, "left", "right")
    assert nodes["left"] == nodes["right"]
    given = devices(gateway)
    assert sorted(f"{given['left']},{given['right']}".split(",")) == ["0", "1", "2", "3"]
    assert {name: len(names.split(",")) for name, names in given.items()} == {"left": 2, "right": 2}
    assert len(queued(slurm)) == 1

    # No GPU is free, and none can be made free: a second node.
    nodes = pinned(gateway, "one")
    assert nodes["one"] != nodes["left"]
    assert len(devices(gateway)["one"].split(",")) == 1

    with gateway.client() as client:
        for verb in ("unpin", "unload"):
            client.post(f"/gateway/v1/models/{verb}", json={"model": "right"}).raise_for_status()
        wait_for(lambda: "right" not in devices(gateway), 60, "right unloaded")
        assert {name: len(names.split(",")) for name, names in devices(gateway).items()} == {"left": 2, "one": 1}
        with ThreadPoolExecutor(1) as one:  # five GPUs are free, four of them on no node
            asked = one.submit(gateway.chat, "four")
            wait_for(lambda: state(gateway, "four") == "queued", 20, "four queued")
            assert "four" not in devices(gateway)
            assert not asked.done()
            client.post("/gateway/v1/models/unpin", json={"model": "one"}).raise_for_status()
            assert asked.result(60).status_code == 200
    assert devices(gateway)["four"] == "0,1,2,3"
    assert engine_nodes(gateway)["four"] == nodes["one"]  # whose model made room
    assert engine_nodes(gateway)["left"] == nodes["left"]


def state(gateway: Gateway, model: str) -> str:
    return str(next(entry["state"] for entry in gateway.status()["models"] if entry["id"] == model))
