"""Parameters and cache of models as published, from their ``config.json`` alone."""

from __future__ import annotations

from typing import Any

import pytest

from gateway_plugin.sizing.architecture import UnknownArchitecture, parse_config
from gateway_plugin.sizing.estimate import cache_bytes, divides, weight_bytes
from gateway_plugin.sizing.plan import Source, Wish, weights_of
from tests.unit.sizing.published import PUBLISHED

ROUGH = {name for name, (_, config) in PUBLISHED.items() if "vision_config" in config or "num_mel_bins" in config}
"""They have a vision tower or a front end of convolutions."""


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_are_those_published(name: str) -> None:
    published, config = PUBLISHED[name]
    counted = parse_config(config).parameters
    allowed = published / 100 if name == "GLM-4.5-Air" else published / 1000 if name in ROUGH else 2000
    assert abs(counted - published) <= allowed


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama-3.1-8B", 128 * 1024),  # 2 * 32 layers * 8 heads * 128 * 2 bytes
        ("Llama-3.3-70B", 320 * 1024),
        ("Qwen2.5-7B", 56 * 1024),
        ("DeepSeek-V3", 61 * (512 + 64) * 2),  # latent attention: one vector a layer
        ("bge-reranker-v2-m3", 0),
    ],
)
def test_the_cache_of_a_token(name: str, expected: int) -> None:
    assert cache_bytes(parse_config(PUBLISHED[name][1]), 1, 1, 1) == expected


def test_layers_with_a_window_keep_no_more_than_it() -> None:
    found = parse_config(PUBLISHED["gpt-oss-120b"][1])
    full, windowed = 18 * 2 * 8 * 64 * 2, 18 * 2 * 8 * 64 * 2
    assert cache_bytes(found, 100_000, 1, 1) == full * 100_000 + windowed * 128


def test_heads_are_divided_and_latent_caches_are_not() -> None:
    llama, deepseek = (parse_config(PUBLISHED[name][1]) for name in ("Llama-3.3-70B", "DeepSeek-V3"))
    assert cache_bytes(llama, 1000, 1, 8) * 8 == cache_bytes(llama, 1000, 1, 1)
    assert cache_bytes(llama, 1000, 1, 16) == cache_bytes(llama, 1000, 1, 8), "eight heads: two GPUs hold the same one"
    assert cache_bytes(deepseek, 1000, 1, 8) == cache_bytes(deepseek, 1000, 1, 1)


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [("Qwen2.5-7B", 4, True), ("Qwen2.5-7B", 8, False), ("SmolLM2-135M", 2, False), ("Llama-3.3-70B", 8, True)],
)
def test_the_number_of_gpus_divides_the_heads(name: str, gpus: int, expected: bool) -> None:
    assert divides(parse_config(PUBLISHED[name][1]), gpus) is expected


def test_quantized_weights() -> None:
    llama = parse_config(PUBLISHED["Llama-3.3-70B"][1])
    assert weight_bytes(llama) == 2 * 70_553_706_496
    assert 68e9 < weight_bytes(llama, "fp8") < 75e9  # RedHatAI's FP8 of it: 72.7 GB
    assert 38e9 < weight_bytes(llama, "awq") < 43e9  # its AWQ: 39.8 GB
    oss = parse_config({**PUBLISHED["gpt-oss-120b"][1], "quantization_config": {"quant_method": "mxfp4"}})
    assert 62e9 < weight_bytes(oss) < 68e9  # its checkpoint: 60.8 GiB


@pytest.mark.parametrize(
    ("quantized", "least", "most"),
    [
        ({"quant_method": "awq", "bits": 4}, 38e9, 43e9),  # 39.8 GB as published
        ({"quant_method": "gptq", "bits": 8}, 70e9, 75e9),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
            38e9,
            43e9,
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
            70e9,
            75e9,
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 70e9, 75e9),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 38e9, 43e9),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 70e9, 75e9),
        ({"quant_method": "compressed-tensors", "config_groups": {"x": 3}, "bits": "4"}, 70e9, 75e9),
    ],
)
def test_published_weights_of_few_bits(quantized: dict[str, Any], least: float, most: float) -> None:
    found = parse_config({**PUBLISHED["Llama-3.3-70B"][1], "quantization_config": quantized})
    assert least < weight_bytes(found) < most
    named = Wish(quantization="awq_marlin")  # of weights that are quantized already
    assert weights_of(Source("org/m", found), named) == weight_bytes(found)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"architectures": None}, "architectures"),
        ({"mamba_d_state": 16}, "mamba_d_state"),
    ],
)  # fmt: skip
def test_a_configuration_that_says_too_little_gives_no_estimate(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnknownArchitecture, match=named):
        parse_config({**PUBLISHED["Llama-3.1-8B"][1], **change})
