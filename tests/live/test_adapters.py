"""vLLM serves a LoRA adapter and takes others while it runs, by the options and requests that it is given here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gateway_plugin.catalog import Model, load_catalog
from gateway_plugin.weights import prepare, resolve
from serve.agent.adapters import DONE, REFUSED, RELOAD, adapt
from serve.agent.timing import Timing
from serve.core.events import EngineReady
from tests.support.agents import NAMED, AgentHost, engine_client, private_layout

pytestmark = [pytest.mark.live, pytest.mark.process]

EXAMPLE = Path(__file__).parents[2] / "examples" / "models.yaml"


def base(adapters: dict[str, str]) -> Model:
    model = load_catalog(EXAMPLE).find("smollm2")
    prepare([model.source.removeprefix("prepared:")])
    return model.model_copy(update={"adapters": adapters})


def adapter(folder: Path, model: Model, scale: float, rank: int = 8) -> str:
    """An adapter of the base's query projections; 0: one that changes nothing."""
    folder.mkdir()
    config = json.loads((Path(resolve(model)) / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    made = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora"
        tensors[f"{name}_A.weight"] = torch.randn(rank, hidden, generator=made) * scale
        tensors[f"{name}_B.weight"] = torch.randn(hidden, rank, generator=made) * scale
    save_file(tensors, folder / "adapter_model.safetensors")
    wanted = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps({**wanted, "bias": "none", "base_model_name_or_path": "x"}))
    return str(folder)


@pytest.fixture(scope="module")
def host() -> Iterator[AgentHost]:
    with private_layout() as layout:
        made = AgentHost(layout, timing=Timing())
        try:
            yield made
        finally:
            made.close()


def test_an_adapter_answers_otherwise_than_its_base_and_more_come_and_go(host: AgentHost, tmp_path: Path) -> None:
    plain = base({})
    idle, loud = adapter(tmp_path / "idle", plain, 0.0), adapter(tmp_path / "loud", plain, 1.0)
    host.start(base({"idle": idle}))
    host.wait(EngineReady, timeout_s=300)
    record = host.record()
    with engine_client(host.layout, record.address) as client:

        def said(model: str) -> str:
            asked = {"model": model, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
            answer = client.post("/v1/completions", json=asked, extensions=NAMED)
            return str(answer.json()["choices"][0]["text"]) if answer.status_code == 200 else str(answer.status_code)

        def adapted(**adapters: str) -> str:
            return asyncio.run(adapt(host.layout, record.engine, adapters))[0]

        bare = said("smollm2")
        assert said("idle") == bare
        assert said("loud") == "404"
        assert adapted(idle=idle, loud=loud) == DONE
        assert said("loud") not in (bare, "404")
        assert adapted(loud=idle) == DONE
        assert (said("loud"), said("idle")) == (bare, "404")
        assert adapted(wide=adapter(tmp_path / "wide", plain, 0.0, rank=64)) == RELOAD, "it was started for rank 16"
        (tmp_path / "idle" / "adapter_model.safetensors").unlink()
        assert adapted(gone=idle) == REFUSED
        assert host.record().pid == record.pid
