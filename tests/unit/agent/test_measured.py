"""What an engine holds, from what vLLM and ``nvidia-smi`` say."""

from __future__ import annotations

import pytest

from serve.agent.measured import cache_tokens, most_of_one_gpu

METRICS = """# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",engine="0",%snum_cpu_blocks="None",num_gpu_blocks="91"} 1.0
"""


@pytest.mark.parametrize(
    ("metrics", "tokens"),
    [
        (METRICS % 'kv_cache_size_tokens="11600",', 11_600),
        (METRICS % "", 11_648),  # 91 blocks of 128
        (METRICS.replace('"91"', '"None"') % "", 0),
        ("vllm:num_requests_running 1", 0),
        ("", 0),
    ],
)
def test_the_room_in_a_cache(metrics: str, tokens: int) -> None:
    assert cache_tokens(metrics) == tokens


@pytest.mark.parametrize(
    ("listed", "mib"),
    [
        ("GPU-a, 10, 500\nGPU-a, 11, 70\nGPU-b, 10, 560\nGPU-b, 99, 9000\n", 570),
        ("GPU-a, 10, [N/A]\n", 0),
        ("No devices were found\n", 0),
        ("", 0),
    ],
)
def test_the_memory_of_an_engines_processes_on_the_gpu_where_it_is_most(listed: str, mib: int) -> None:
    assert most_of_one_gpu(listed, {10, 11}) == mib
