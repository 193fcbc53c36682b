"""What an engine holds once it is loaded: memory of its GPUs by process, and room in its cache of keys and values."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Collection

from gateway_plugin.processes import Mark, group_members
from serve.agent.node import DevicesUnseen, nvidia_smi

_CACHE = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def cache_tokens(metrics: str) -> int:
    """Tokens that vLLM's cache has room for, by its ``/metrics``; 0: they do not say. Earlier versions give its blocks
    alone (``num_gpu_blocks``, also without a GPU). Pure."""
    found = _CACHE.search(metrics)
    labels = dict(_LABEL.findall(found[1])) if found is not None else {}
    tokens, blocks, size = (labels.get(key, "") for key in ("kv_cache_size_tokens", "num_gpu_blocks", "block_size"))
    if tokens.isdecimal():
        return int(tokens)
    return int(blocks) * int(size) if blocks.isdecimal() and size.isdecimal() else 0


def most_of_one_gpu(listed: str, pids: Collection[int]) -> int:
    """MiB that these processes hold of the GPU where they hold most, in the output of ``nvidia-smi``: lines of GPU, PID
    and MiB. 0: none of them is there, or their memory is not reported (``[N/A]``). Pure."""
    held: Counter[str] = Counter()
    for line in listed.splitlines():
        gpu, _, rest = line.partition(",")
        pid, _, mib = (part.strip() for part in rest.partition(","))
        if pid.isdecimal() and mib.isdecimal() and int(pid) in pids:
            held[gpu.strip()] += int(mib)
    return max(held.values(), default=0)


async def device_mib_of(leader: Mark, timeout_s: float = 10.0) -> int:
    """As ``most_of_one_gpu``, for the processes of an engine; 0 also where there is no ``nvidia-smi``."""
    try:
        said = await nvidia_smi("--query-compute-apps=gpu_uuid,pid,used_memory", timeout_s=timeout_s)
    except DevicesUnseen:
        return 0
    members = await asyncio.to_thread(group_members, leader)
    return most_of_one_gpu(said, {member.pid for member in members})
