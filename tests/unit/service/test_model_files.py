"""What ``doctor`` sees of a model's files: kinds that nothing here serves, weights larger than their memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway_plugin.catalog import Catalog, Model, parse_catalog
from gateway_plugin.service.checks import Verdict
from gateway_plugin.service.preflight import failures, weights


def model(source: str, **entry: object) -> Model:
    return parse_catalog({"models": {"m": {"source": source, "memory_gib": 1, **entry}}}, "test").models[0]


def folder(tmp_path: Path, *architectures: str, mib: int = 0) -> str:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": list(architectures)}))
    with (tmp_path / "model-00001-of-00001.safetensors").open("wb") as file:
        file.truncate(mib * 2**20)
    return str(tmp_path)


def checked(one: Model) -> dict[str, str]:
    return {check.name: check.verdict.value for check in weights(Catalog(models=(one,)))}


@pytest.mark.parametrize("kind", ["WhisperForConditionalGeneration", "FunASRForConditionalGeneration"])
def test_a_folder_of_speech_is_refused_unless_its_task_is_to_transcribe(tmp_path: Path, kind: str) -> None:
    (found,) = failures(weights(Catalog(models=(model(folder(tmp_path, kind)),))))
    assert found.name == "kind of m"
    assert kind in found.found
    assert "task: transcribe" in found.advice
    assert found.configuration, "'up' refuses it too"
    assert "kind of m" not in checked(model(folder(tmp_path, kind), task="transcribe"))


@pytest.mark.parametrize(
    "source",
    ["openai/whisper-large-v3", "openai/whisper-tiny@main", "distil-whisper/distil-v3", "Systran/faster-whisper-tiny"],
)
def test_a_whisper_is_known_by_its_hub_name(source: str) -> None:
    assert checked(model(source))["kind of m"] == "fail"
    assert "kind of m" not in checked(model(source, task="transcribe"))


@pytest.mark.parametrize("source", ["org/whisper-of-the-heart-7b", "Qwen/Qwen3-8B", "org/whisperer"])
def test_other_names_are_nothing_to_refuse(source: str) -> None:
    assert "kind of m" not in checked(model(source))


def test_a_pipeline_of_pictures_is_refused_and_text_is_not(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert checked(model(str(tmp_path)))["kind of m"] == "fail"
    command = ["images", "--port", "{port}"]
    assert "kind of m" not in checked(model(str(tmp_path), task="image", engine="command", command=command))
    assert "kind of m" not in checked(model(folder(tmp_path, "LlamaForCausalLM")))
    for damaged in ("{", "[]", '{"architectures": null}'):
        (tmp_path / "config.json").write_text(damaged)
        assert "kind of m" not in checked(model(str(tmp_path))), "vLLM says what is wrong"


def test_weights_larger_than_memory_gib_are_a_warning_with_numbers(tmp_path: Path) -> None:
    source = folder(tmp_path, "LlamaForCausalLM", mib=6 * 1024)
    catalog = Catalog(models=(model(source, gpus=2, memory_gib=2.5),))
    (found,) = [check for check in weights(catalog) if "size" in check.name]
    assert found.verdict is Verdict.WARN
    assert "3.0 GiB on each GPU" in found.found
    assert "memory_gib: 2.5" in found.found
    assert "KV cache" in found.found
    assert "size of m" not in checked(model(source, gpus=2, memory_gib=3.5))
    assert checked(model(source, memory_gib=5))["size of m"] == "warn"
    (tmp_path / "consolidated.safetensors").write_bytes(b"x")  # the same weights once more: not counted
    assert "size of m" not in checked(model(source, memory_gib=6))
    assert "size of m" not in checked(model(source, memory_gib=4, args=["--quantization=fp8"]))
