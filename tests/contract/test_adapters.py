"""What an engine must do with LoRA adapters, the fake one and vLLM alike: serve them, and take others while it runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_plugin.adapter_folders import fitting_folder
from gateway_plugin.catalog import Model, load_catalog
from gateway_plugin.errors import ConfigError
from gateway_plugin.weights import prepare, resolve
from serve.agent.adapters import DONE, REFUSED, RELOAD, adapt
from serve.agent.timing import Timing
from serve.core.events import EngineReady
from tests.support.agents import NAMED, QUICK, AgentHost, engine_client, fake_model, private_layout
from tests.support.images import charliecloud, missing

pytestmark = pytest.mark.process

EXAMPLE = Path(__file__).parents[2] / "examples" / "models.yaml"


def base(kind: str, adapters: dict[str, str]) -> Model:
    if kind == "fake":
        return fake_model("tiny", "generate", "--enable-lora", "--lora-modules", "{adapters}", adapters=adapters)
    model = load_catalog(EXAMPLE).find("smollm2")
    prepare([model.source.removeprefix("prepared:")])
    return model.model_copy(update={"adapters": adapters})


def adapter(kind: str, folder: Path, scale: float = 0.0, rank: int = 8, hidden: int = 0) -> str:
    """An adapter of the base's query projections, in PEFT's form; 0: one that changes nothing. ``hidden``: of a base
    with so many dimensions."""
    folder.mkdir()
    wanted = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    wanted |= {"target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (folder / "adapter_config.json").write_text(json.dumps(wanted))
    if kind == "fake":
        (folder / "adapter_model.safetensors").touch()
        return str(folder)
    import torch
    from safetensors.torch import save_file

    config = json.loads((Path(resolve(base(kind, {}))) / "config.json").read_text())
    hidden, layers = hidden or config["hidden_size"], config["num_hidden_layers"]
    made, tensors = torch.Generator().manual_seed(1), {}
    for layer in range(layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora"
        tensors[f"{name}_A.weight"] = torch.randn(rank, hidden, generator=made) * scale
        tensors[f"{name}_B.weight"] = torch.randn(hidden, rank, generator=made) * scale
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with private_layout() as layout:
        made = AgentHost(layout, timing=Timing())
        try:
            yield made
        finally:
            made.close()


@pytest.mark.parametrize("kind", ["fake", pytest.param("vllm", marks=pytest.mark.live)])
def test_an_adapter_is_a_model_of_its_own_and_others_come_and_go(host: AgentHost, tmp_path: Path, kind: str) -> None:
    idle, loud = adapter(kind, tmp_path / "idle"), adapter(kind, tmp_path / "loud", 1.0)
    model = base(kind, {"idle": idle})
    host.timing = QUICK if kind == "fake" else Timing()
    host.start(model)
    host.wait(EngineReady, timeout_s=300)
    record = host.record()
    with engine_client(host.layout, record.address) as client:

        def said(name: str) -> str:
            asked = {"model": name, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
            answer = client.post("/v1/completions", json=asked, extensions=NAMED)
            return str(answer.json()["choices"][0]["text"]) if answer.status_code == 200 else str(answer.status_code)

        def adapted(**adapters: str) -> str:
            outcome, why = asyncio.run(adapt(host.layout, record.engine, adapters))
            print(outcome, why)
            return outcome

        bare = said(model.aliases[0])
        assert bare != "404"
        assert kind == "fake" or said("idle") == bare
        assert said("loud") == "404"
        assert adapted(idle=idle, loud=loud) == DONE
        assert said("loud") not in (bare, "404")
        assert adapted(loud=idle) == DONE
        assert (said("loud") == bare or kind == "fake", said("idle")) == (True, "404")
        assert adapted(wide=adapter(kind, tmp_path / "wide", rank=64)) == RELOAD, "it was started for rank 16"
        assert said("loud") != "404", "what it served until it is loaded again"
        (tmp_path / "idle" / "adapter_model.safetensors").unlink()
        assert adapted(gone=idle) == REFUSED
        assert adapted(nowhere=str(tmp_path / "nowhere")) == REFUSED
        assert said("loud") != "404", "a catalog that is refused takes nothing away"
        if kind == "vllm":  # it would load this one, and answer with it
            foreign = adapter(kind, tmp_path / "foreign", hidden=64)
            with pytest.raises(ConfigError, match="another base's adapter"):
                fitting_folder(model, "foreign", foreign)
            fitting_folder(model, "loud", loud)
        assert adapted() == DONE
        assert said(model.aliases[0]) == bare or kind == "fake"
        assert host.record().pid == record.pid


@pytest.mark.skipif(bool(missing()), reason=f"no container: {missing()}")
def test_a_folder_that_its_container_has_not_is_there_after_a_reload(
    host: AgentHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # homes of containers
    one, two = adapter("fake", tmp_path / "one"), adapter("fake", tmp_path / "two")
    box = charliecloud(tmp_path / "image")
    host.start(base("fake", {"one": one}).model_copy(update={"runtime": box}))
    host.wait(EngineReady)
    wanted = {"one": one, "two": two}
    outcome, why = asyncio.run(adapt(host.layout, "e1", wanted))
    assert (outcome, f"No adapter found for {two}" in why) == (RELOAD, True)
    host.start(base("fake", wanted).model_copy(update={"runtime": box}), engine="e2")
    host.wait(EngineReady, "e2")
    assert asyncio.run(adapt(host.layout, "e2", wanted))[0] == DONE


def test_an_engine_that_cannot_or_is_not_there_is_to_be_loaded_again(host: AgentHost, tmp_path: Path) -> None:
    wanted = {"a": adapter("fake", tmp_path / "a")}
    assert asyncio.run(adapt(host.layout, "e1", wanted))[0] == RELOAD
    host.start(fake_model("tiny"))  # without LoRA
    host.wait(EngineReady)
    outcome, why = asyncio.run(adapt(host.layout, "e1", wanted))
    assert (outcome, "/v1/load_lora_adapter of a is answered 404" in why) == (RELOAD, True)
