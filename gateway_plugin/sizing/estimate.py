"""Bytes of weights, cache and buffers of one engine on each of its GPUs. Pure."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from gateway_plugin.sizing.architecture import Architecture

MIB = 2**20
BYTES = {
    "float32": 4.0,
    "float": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "half": 2.0,
    "float8_e4m3fn": 1.0,
    "float8_e5m2": 1.0,
}
QUANTIZED = {
    "fp8": 1.0, "compressed-tensors": 1.0, "int8": 1.0, "bitsandbytes": 0.56, "awq": 0.56, "gptq": 0.56, "mxfp4": 0.53,
    "nvfp4": 0.56, "modelopt": 0.56,
}  # fmt: skip
"""Bytes an element with its scales: 4 bits and a 16-bit scale (and zero) for every 128, or an 8-bit one for every 32
(mxfp4) or 16 (nvfp4)."""
_SCALES = 0.06
"""Bytes of scales and zeros for an element of less than 8 bits."""
_CONTEXT_MIB = 1536
"""CUDA's context, libraries, captured graphs: 1.1 to 1.4 GiB with vLLM 0.26 on an H100 (docs/switching.md)."""
_HOST_PROGRAMS_MIB = 1472
"""Python processes with PyTorch, and the activations of a step: 1.3 to 1.7 GiB were measured for the two models of
examples/models.yaml, less where another engine shares the pages of the libraries."""
_TRANSFORMERS_MIB = 576
"""One Python process with PyTorch and Transformers, without a GPU: 0.5 to 0.6 GiB were measured."""
_COLLECTIVES_MIB = 1024
"""Buffers of NCCL and of the custom all-reduce, on each of several GPUs."""
_BATCHED_TOKENS = 8192
"""vLLM's ``max_num_batched_tokens`` on such GPUs: the buffers of one step are sized by it."""
_SEQUENCES = 256
"""Sequences whose logits a step computes at most."""


@dataclass(frozen=True)
class Estimate:
    """One engine, per GPU, in bytes."""

    gpus: int
    weights: int
    cache: int
    """For ``sequences`` sequences of ``context`` tokens."""
    buffers: int
    context: int
    sequences: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.buffers

    @property
    def gib(self) -> float:
        """``memory_gib`` of a catalog entry: the sum, to the next half GiB; below 8 to the next tenth."""
        tenths = -(-self.total * 10 // 2**30)
        return tenths / 10 if tenths < 80 else -(-self.total // (512 * MIB)) / 2


def weight_bytes(architecture: Architecture, quantization: str = "") -> int:
    """All weights, where their files' size is not known, or where the engine is to quantize them."""
    method = quantization or architecture.quantization
    plain = BYTES.get(architecture.dtype, 2.0)
    if not method:
        return int(architecture.parameters * plain)
    packed = QUANTIZED.get(method, plain)
    if architecture.bits and not quantization:
        packed = architecture.bits / 8 + (_SCALES if architecture.bits < 8 else 0.0)
    embeddings = min(architecture.parameters, 2 * architecture.vocabulary * architecture.hidden)
    if method == "mxfp4":  # experts alone are packed
        return int((architecture.parameters - architecture.expert_parameters) * plain
                   + architecture.expert_parameters * packed)  # fmt: skip
    return int(embeddings * plain + (architecture.parameters - embeddings) * packed)


def cache_bytes(architecture: Architecture, context: int, sequences: int, gpus: int, element: float = 0.0) -> int:
    """The cache of keys and values on one GPU, for ``sequences`` sequences of ``context`` tokens each.

    ``element``: bytes of one element; 0: as the weights' type, 2 for quantized ones.
    """
    element = element or BYTES.get(architecture.dtype, 2.0)
    total = 0.0
    for kind in architecture.attention:
        tokens = context if kind.window is None else min(context, kind.window)
        shards = 1 if kind.shards is None else min(gpus, kind.shards)
        total += kind.layers * kind.per_token * tokens * element / shards
    return int(total * sequences)


def buffer_bytes(architecture: Architecture, gpus: int) -> int:
    """What an engine needs on a GPU beside weights and cache: libraries, graphs, the activations of one step."""
    wide = 2 * architecture.intermediate / gpus + 4 * architecture.hidden
    step = _BATCHED_TOKENS * wide * 2 + _SEQUENCES * architecture.vocabulary * 4 * 2 / gpus
    return int((_CONTEXT_MIB + (_COLLECTIVES_MIB if gpus > 1 else 0)) * MIB + step)


def estimate(
    architecture: Architecture, weights: int, gpus: int, context: int, sequences: int, cache_element: float = 0.0
) -> Estimate:
    """One engine on ``gpus`` GPUs. ``weights``: bytes of all weights."""
    return Estimate(
        gpus=gpus,
        weights=-(-weights // gpus),
        cache=cache_bytes(architecture, context, sequences, gpus, cache_element),
        buffers=buffer_bytes(architecture, gpus),
        context=context,
        sequences=sequences,
    )


def estimate_host(architecture: Architecture, context: int, sequences: int, element: float = 0.0) -> Estimate:
    """One engine in host memory. vLLM gets float32 there (``serve.agent.argv``), for weights and cache, unless
    ``element`` (bytes) says otherwise."""
    element = element or 4.0
    cache = cache_bytes(architecture, context, sequences, 1, element)
    return Estimate(0, int(architecture.parameters * element), cache, _HOST_PROGRAMS_MIB * MIB, context, sequences)


def estimate_transformers(architecture: Architecture, weights: int, gpus: int, context: int) -> Estimate:
    """One ``transformers serve``, which works on one request at a time: weights and cache in the weights' own type, in
    host memory or on one GPU. ``weights``: bytes of all weights."""
    cache = cache_bytes(architecture, context, 1, 1)
    buffers = _CONTEXT_MIB if gpus else _TRANSFORMERS_MIB
    return Estimate(gpus, weights, cache, buffers * MIB, context, 1)


def divides(architecture: Architecture, gpus: int) -> bool:
    """Whether vLLM can divide the model over ``gpus`` GPUs: its heads evenly, its key-value heads evenly or whole."""
    shards = [kind.shards for kind in architecture.attention if kind.shards is not None]
    return architecture.heads % gpus == 0 and all(one % gpus == 0 or gpus % one == 0 for one in shards)


def longest_context(
    architecture: Architecture, weights: int, gpus: int, gpu_bytes: int, cache_element: float = 0.0
) -> int:
    """Tokens of the longest context of one sequence that fits beside the weights; 0: not even the weights fit."""
    free = gpu_bytes - (-(-weights // gpus)) - buffer_bytes(architecture, gpus)
    return tokens_held(architecture, free, architecture.context, gpus, cache_element) if free > 0 else 0


def tokens_held(architecture: Architecture, cache: int, most: int, gpus: int, element: float) -> int:
    """Tokens of one sequence, at most ``most``, that a cache of ``cache`` bytes on each GPU holds."""
    return bisect_right(
        range(1, most + 1), cache, key=lambda tokens: cache_bytes(architecture, tokens, 1, gpus, element)
    )
