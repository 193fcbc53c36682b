"""A site without internet on its nodes: the hub is reachable from the gateway's machine alone, and stands in on
loopback. A name becomes an entry, its weights are fetched, and vLLM answers from them; others are fetched on request.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from gateway_plugin.fetching import fetch
from gateway_plugin.hub_cache import lacks, snapshot
from gateway_plugin.weights import prepare
from tests.support.gateways import Gateway, chat_body, fake_model, gateway_of, wait_for
from tests.support.hub import CONFIG, SHA, Hub, Repository, serving

pytestmark = pytest.mark.live

MIB = 1 << 20
CHAT = "smollm2-135m-instruct"
CONTENT = bytes(range(256)) * (20 * MIB // 256)
SMOL = "0" * 39 + "7"
NO_WAIT = {"x-gateway-wait": "0"}
DEAD = "http://127.0.0.1:9"

_SITE = """
from pathlib import Path
from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider
from gateway_plugin.site import NodeType, Site

site = Site(
    name="offline", port={port}, ray_port={ray_port}, block_idle_s=300, last_block_idle_s=300,
    weights_folder=Path({folder!r}), fetch="on-request",
    node_types=(NodeType(
        name="local",
        provider=LocalProvider(launcher=SimpleLauncher(), init_blocks=0, min_blocks=0, max_blocks=1),
        cpus=2, engine_memory_gib=4, min_blocks=1, max_blocks=1, engines_on_loopback=True,
        worker_init="export HF_ENDPOINT={dead} HF_TOKEN=hf_of_the_node https_proxy={dead} HF_HOME=/nonexistent",
    ),),
)
"""


def reads_its_weights(folder: Path) -> dict[str, Any]:
    """A fake engine that is given the weights of a hub model."""
    entry = fake_model(folder, memory_gib=0.5)
    return {**entry, "source": f"org/m@{SHA}", "command": [*entry["command"], "--model", "{source}"]}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """``org/smol``: the small chat model; ``org/m``: for the fake engine."""
    folder = prepare([CHAT])[CHAT]
    smol = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}
    smol.pop("gateway-plugin.json")
    small, other = ({"config.json": CONFIG, "model.safetensors": name + CONTENT} for name in (b"m", b"n"))
    repositories = {"org/smol": Repository(smol, SMOL), "org/m": Repository(small), "org/n": Repository(other)}
    with serving(repositories) as found:
        yield found


def offline(hub: Hub, folder: Path) -> AbstractContextManager[Gateway]:
    """A gateway whose nodes cannot reach the hub; its own machine can."""

    def site(port: int, ray_port: int) -> str:
        return _SITE.format(port=port, ray_port=ray_port, folder=str(folder), dead=DEAD)

    def models(memory: Path) -> dict[str, Any]:
        fake = reads_its_weights(memory)
        return {"fake": fake, "other": {**fake, "source": "org/n"}}

    environment = {**os.environ, **hub.environment(folder), "HF_TOKEN": "hf_of_the_login"}
    return gateway_of(site, models, environment=environment)


def test_a_site_without_internet_on_its_nodes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """(1) A model is fetched because a request asks for it; (2) another one by command, from its name to an answer of
    vLLM; (3) a gateway that goes down ends its fetch, and the next fetch continues it."""
    weights = tmp_path / "weights"
    hub.here(monkeypatch, weights)
    hub.chunk_s = 0.03
    with offline(hub, weights) as gateway:
        _fetched_because_a_request_asks(gateway, weights)
        hub.chunk_s = 0.0
        _from_a_name_to_an_answer(gateway)
        hub.chunk_s = 0.03
        before = sum(hub.sent.values())
        gateway.cli("models", "load", "other")
        wait_for(lambda: sum(hub.sent.values()) > before + 4 * MIB, 60, "nothing is fetched")
    hub.chunk_s = 0.0  # (3): 'down' has ended the fetch, with all else that belongs to the gateway
    done = fetch("org/n", "", weights)
    assert done.fetched_bytes < 18 * MIB
    assert sum(hub.sent.values()) < before + 23 * MIB
    assert {said for server, _, _, said in hub.seen if server == "content"} == {""}
    assert "Bearer hf_of_the_node" not in {said for _, _, _, said in hub.seen}


def _fetched_because_a_request_asks(gateway: Gateway, weights: Path) -> None:
    wait_for(lambda: [node for node in gateway.status()["nodes"] if node["phase"] == "up"], 60, "no node")
    states: list[dict[str, Any]] = []
    told: list[str] = []
    body = chat_body("fake", stream=True)
    with gateway.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as streamed:
        for line in streamed.iter_lines():
            told.append(line)
            if line.startswith(":"):
                states += [one for one in client.get("/v1/models").json()["data"] if one["id"] == "fake"]
            if len(told) == 1:  # for who does not wait
                late = client.post("/v1/chat/completions", json=chat_body("fake"), headers=NO_WAIT)
    words = "fake is fetching: its weights are being fetched: "
    assert any(words in line and " of 20.0 MiB" in line for line in told), told
    assert "data: [DONE]" in told
    assert any(one["state"] == "fetching" and one["eta_s"] for one in states), states
    assert (late.status_code, late.json()["error"]["state"]) == (503, "fetching")
    assert int(late.headers["retry-after"]) > 0
    folder = snapshot(weights, "org/m", SHA)
    assert folder is not None
    assert lacks(folder) == ""
    answer = gateway.chat("fake", f"@read={folder}/config.json")
    assert CONFIG.decode() in answer.text.replace("\\", "")
    gateway.cli("models", "unload", "fake")


def _from_a_name_to_an_answer(gateway: Gateway) -> None:
    words = ("models", "add", "org/smol", "--as", "smol", "--context", "1024", "--concurrency", "2", "--json")
    assert json.loads(gateway.cli(*words).stdout)["in_force"]
    (fetched,) = json.loads(gateway.cli("models", "fetch", "smol", "--json").stdout)
    assert (fetched["revision"], fetched["fetched_bytes"] > 100 * MIB) == (SMOL, True)
    answer = gateway.chat("smol", "What is the capital of France?", temperature=0, max_tokens=24)
    assert answer.status_code == 200, answer.text
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]
    (pid,) = gateway.engine_pids().values()
    found = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    assert "HF_HUB_OFFLINE=1" in found
    assert not [line for line in found if line.startswith(("HF_TOKEN=", "HUGGING_FACE_HUB_TOKEN="))]
    listed = json.loads(gateway.cli("models", "weights", "--json").stdout)["weights"]
    assert {one["repository"]: one["entries"] for one in listed} == {"org/m": ["fake"], "org/smol": ["smol"]}
