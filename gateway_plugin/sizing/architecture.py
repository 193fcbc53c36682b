"""What a model's ``config.json`` says about its size: parameters by kind, and the cache that a token takes.

Parameters are counted from the shapes of the layers as Hugging Face Transformers builds them; the counts agree with
those published for the models in ``tests/unit/sizing``. A configuration without the numbers that this needs gives
``UnknownArchitecture``: no estimate is better than a wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_WORD = re.compile(r"[A-Za-z0-9_.-]{1,80}")
"""A name or kind in a configuration: it is printed, and written into a catalog's comments."""
_LAYERS_MAX = 10_000


class UnknownArchitecture(Exception):
    """No estimate can be made; the text says which number is missing, or what is not known."""


@dataclass(frozen=True)
class Attention:
    """The layers of one kind of attention. All sizes are elements, not bytes."""

    layers: int
    per_token: int
    """Elements of the cache that a token takes in one layer."""
    window: int | None = None
    """Tokens that a layer looks back at most; ``None``: the whole context."""
    shards: int | None = None
    """Over how many GPUs the cache can be divided (its heads); ``None``: each GPU holds all of it."""


@dataclass(frozen=True)
class Architecture:
    """A model's sizes."""

    name: str
    """``architectures[0]`` of its configuration."""
    parameters: int
    expert_parameters: int
    """Of these, those of routed experts."""
    heads: int
    """Attention heads: the number of GPUs must divide it."""
    context: int
    """The longest context that it was made for, in tokens."""
    attention: tuple[Attention, ...]
    """Empty: no cache (an encoder)."""
    hidden: int
    intermediate: int
    """Width of the widest dense layer, for the engine's buffers."""
    vocabulary: int
    dtype: str
    """Of its published weights: ``bfloat16``, ``float16``, ``float32``."""
    quantization: str = ""
    """Method of its published weights (``fp8``, ``awq``, ``mxfp4``, ...); ``""``: none."""
    bits: int = 0
    """Of a quantized weight, where its configuration says so; 0: by the method."""


def parse_config(config: Mapping[str, Any]) -> Architecture:
    """The sizes in a parsed ``config.json``. Raises ``UnknownArchitecture``."""
    kinds = config.get("architectures")
    if not isinstance(kinds, list) or not kinds or not isinstance(kinds[0], str) or not _WORD.fullmatch(kinds[0]):
        raise UnknownArchitecture("its config.json names no architecture ('architectures')")
    nested = config.get("text_config")
    text = {**config, **nested} if isinstance(nested, Mapping) else config
    if "d_model" in config and "encoder_layers" in config:
        return _encoder_decoder(kinds[0], config)
    for odd in ("ssm_cfg", "mamba_d_state", "linear_num_value_heads", "ssm_state_size", "rwkv"):
        if odd in text:
            raise UnknownArchitecture(f"{kinds[0]}: its state is not a cache of keys and values ('{odd}')")
    if "max_position_embeddings" in text and "type_vocab_size" in text and "num_key_value_heads" not in text:
        return _encoder(kinds[0], text)
    return _decoder(kinds[0], config, text)


def _decoder(name: str, config: Mapping[str, Any], text: Mapping[str, Any]) -> Architecture:
    hidden, layers, heads = _shape(text)
    vocabulary = _number(text, "vocab_size")
    kv_heads = _number(text, "num_key_value_heads", heads)
    head = _number(text, "head_dim", hidden // heads)
    attention, attention_parameters = _attention(name, text, hidden, layers, heads, kv_heads, head)
    dense, experts, widest = _feed_forward(text, hidden, layers)
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", _tied_by_default(name))))
    embeddings = vocabulary * hidden * (1 if tied else 2)
    norms = (4 if name.startswith(("Gemma2", "Gemma3")) else 2) * hidden * layers + hidden
    total = embeddings + attention_parameters + dense + experts + norms + _vision(config.get("vision_config"), hidden)
    return Architecture(
        name=name,
        parameters=total,
        expert_parameters=experts,
        heads=heads,
        context=_number(text, "max_position_embeddings", 131_072 if name.startswith("Gemma3") else None),
        attention=attention,
        hidden=hidden,
        intermediate=widest,
        vocabulary=vocabulary,
        dtype=_dtype(config, text),
        quantization=_quantization(config),
        bits=_bits(config.get("quantization_config")),
    )


def _attention(
    name: str, text: Mapping[str, Any], hidden: int, layers: int, heads: int, kv_heads: int, head: int
) -> tuple[tuple[Attention, ...], int]:
    """Kinds of attention and their parameters over all layers.

    (1) latent attention keeps one compressed vector and one rotated key a token, the same on every GPU; (2) else a key
    and a value for each key-value head, in layers that look back over all tokens or over a window.
    """
    if latent := _optional(text, "kv_lora_rank"):  # (1)
        rope = _number(text, "qk_rope_head_dim")
        nope, value = _number(text, "qk_nope_head_dim"), _number(text, "v_head_dim")
        query = _optional(text, "q_lora_rank")
        queries = heads * (nope + rope)
        asks = hidden * queries if not query else hidden * query + query * queries + query
        keys = hidden * (latent + rope) + latent * heads * (nope + value) + latent
        return (Attention(layers, latent + rope),), layers * (asks + keys + heads * value * hidden)
    per_layer = hidden * heads * head * 2 + hidden * kv_heads * head * 2
    if text.get("attention_bias") or name.startswith("Qwen2"):
        per_layer += heads * head + 2 * kv_heads * head
        per_layer += hidden if name.startswith("GptOss") else 0
    if name.startswith(("Qwen3", "Gemma3")):
        per_layer += 2 * head  # norms of queries and keys
    if name.startswith("GptOss"):
        per_layer += heads  # sinks
    windowed = _windowed_layers(name, text, layers)
    made: list[Attention] = []
    if layers - windowed:
        made.append(Attention(layers - windowed, 2 * kv_heads * head, None, kv_heads))
    if windowed:
        made.append(Attention(windowed, 2 * kv_heads * head, _number(text, "sliding_window"), kv_heads))
    return tuple(made), layers * per_layer  # (2)


def _windowed_layers(name: str, text: Mapping[str, Any], layers: int) -> int:
    """How many layers look back over a window only."""
    if not _optional(text, "sliding_window") or text.get("use_sliding_window") is False:
        return 0
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        return min(layers, kinds.count("sliding_attention"))
    if name.startswith("Gemma2"):
        return layers // 2 + layers % 2
    if name.startswith("Gemma3"):
        return layers - layers // _number(text, "sliding_window_pattern", 6)
    return layers


def _feed_forward(text: Mapping[str, Any], hidden: int, layers: int) -> tuple[int, int, int]:
    """Parameters of all dense layers (routers and shared experts with them), those of all routed experts, and the width
    of the widest dense layer."""
    llama4 = text.get("model_type") == "llama4_text"  # every sparse layer has one more expert, for all tokens
    expert_width = _number(text, "intermediate_size")
    width = _number(text, "intermediate_size_mlp", expert_width) if llama4 else expert_width
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    count = next((found for key in names if (found := _optional(text, key))), 0)
    if not count:
        return layers * 3 * hidden * width, 0, width
    expert_width = _number(text, "moe_intermediate_size", expert_width)
    first_dense = _optional(text, "first_k_dense_replace")
    step = _optional(text, "decoder_sparse_step") or _optional(text, "interleave_moe_layer_step") or 1
    said = text.get("mlp_only_layers")
    dense_only = said if isinstance(said, list) else []
    sparse = sum(
        index >= first_dense and index not in dense_only and (index + 1) % step == 0 for index in range(layers)
    )
    biased = text.get("model_type") == "gpt_oss"
    expert = 3 * hidden * expert_width + (2 * expert_width + hidden if biased else 0)
    shared_experts = 1 if llama4 else _optional(text, "n_shared_experts")
    shared = shared_experts * 3 * hidden * expert_width
    if shared_width := _optional(text, "shared_expert_intermediate_size"):
        shared = 3 * hidden * shared_width + hidden
    router = hidden * count + (count if biased or text.get("topk_method") == "noaux_tc" else 0)
    dense = (layers - sparse) * 3 * hidden * width + sparse * (router + shared)
    widest = max(width if layers > sparse else 0, expert_width, shared_experts * expert_width)
    return dense, sparse * count * expert, widest


def _vision(config: Any, hidden: int) -> int:
    """Parameters of a vision tower, to a few percent; 0 without one."""
    if not isinstance(config, Mapping):
        return 0
    width = _optional(config, "hidden_size") or _optional(config, "embed_dim")
    depth = _optional(config, "num_hidden_layers") or _optional(config, "depth")
    if not width or not depth:
        return 0
    inner = _optional(config, "intermediate_size") or 4 * width
    matrices = 3 if config.get("hidden_act") == "silu" else 2
    merged = width * (_optional(config, "spatial_merge_size") or 1) ** 2
    levels = config.get("deepstack_visual_indexes")  # Qwen3-VL: their features are merged, too
    mergers = 1 + (len(levels) if isinstance(levels, list) else 0)
    return depth * (4 * width * width + matrices * width * inner) + mergers * (merged * merged + merged * hidden)


def _encoder(name: str, text: Mapping[str, Any]) -> Architecture:
    """BERT's shape: two matrices a feed-forward layer, biases, positions as parameters, no cache."""
    hidden, layers, heads = _shape(text)
    width, vocabulary = _number(text, "intermediate_size"), _number(text, "vocab_size")
    positions = _number(text, "max_position_embeddings")
    embeddings = (vocabulary + positions + _number(text, "type_vocab_size")) * hidden + 2 * hidden
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * width + width + hidden + 4 * hidden
    head = hidden * hidden + hidden  # BERT's pooler, or the first layer of a classifier
    return Architecture(
        name=name,
        parameters=embeddings + layers * layer + head,
        expert_parameters=0,
        heads=heads,
        context=positions - 2 if "Roberta" in name else positions,
        attention=(),
        hidden=hidden,
        intermediate=width,
        vocabulary=vocabulary,
        dtype=_dtype(text, text, "float32"),
    )


def _encoder_decoder(name: str, config: Mapping[str, Any]) -> Architecture:
    """Whisper's shape: every decoder layer keeps its own tokens, and the encoder's output once a request."""
    width, vocabulary = _number(config, "d_model"), _number(config, "vocab_size")
    encoders, decoders = _number(config, "encoder_layers"), _number(config, "decoder_layers")
    inner = _number(config, "decoder_ffn_dim")
    target, source = _number(config, "max_target_positions"), _number(config, "max_source_positions")
    encoder = 4 * width * width + 2 * width * inner
    decoder = 8 * width * width + 2 * width * inner
    front = 3 * width * (_number(config, "num_mel_bins") + width)
    total = encoders * encoder + decoders * decoder + (vocabulary + target + source) * width + front
    heads = _number(config, "decoder_attention_heads")
    return Architecture(
        name=name,
        parameters=total,
        expert_parameters=0,
        heads=heads,
        context=target,
        attention=(
            Attention(decoders, 2 * width, None, heads),
            Attention(decoders, 2 * width * max(1, source // target), None, heads),
        ),
        hidden=width,
        intermediate=inner,
        vocabulary=vocabulary,
        dtype=_dtype(config, config),
    )


def _shape(text: Mapping[str, Any]) -> tuple[int, int, int]:
    """Width, number of layers, number of attention heads."""
    hidden, layers, heads = (_number(text, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    if layers > _LAYERS_MAX:
        raise UnknownArchitecture(f"its config.json has an unusable value ({layers}) of 'num_hidden_layers'")
    return hidden, layers, heads


def _optional(config: Mapping[str, Any], key: str) -> int:
    """A number that may be missing, ``null`` or 0: then it is 0."""
    return _number(config, key) if config.get(key) else 0


def _number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 10**12:
        what = "has no" if value is None else f"has an unusable value ({value!r}) of"
        raise UnknownArchitecture(f"its config.json {what} '{key}'")
    return value


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any], default: str = "bfloat16") -> str:
    said = next((each[key] for each in (config, text) for key in ("dtype", "torch_dtype") if each.get(key)), default)
    return _word(said, "dtype").removeprefix("torch.")


def _quantization(config: Mapping[str, Any]) -> str:
    said = config.get("quantization_config")
    return _word(said.get("quant_method", "unknown"), "quant_method") if isinstance(said, Mapping) else ""


def _bits(said: Any) -> int:
    """Bits of a quantized weight: ``bits`` (GPTQ, AWQ), ``config_groups`` (compressed-tensors), ``quant_algo``
    (ModelOpt), ``load_in_8bit`` (bitsandbytes); 0: none of them says it."""
    if not isinstance(said, Mapping):
        return 0
    found = [said.get("bits"), said.get("w_bit")]
    groups = said.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        found.append(weights.get("num_bits") if isinstance(weights, Mapping) else None)
    found += [8] if said.get("quant_algo") == "FP8" or said.get("load_in_8bit") is True else []
    return max((bits for bits in found if isinstance(bits, int) and bits in (2, 3, 4, 5, 6, 8, 16)), default=0)


def _word(said: Any, key: str) -> str:
    if not isinstance(said, str) or not _WORD.fullmatch(said):
        raise UnknownArchitecture(f"its config.json has an unusable value ({said!r}) of '{key}'")
    return said


def _tied_by_default(name: str) -> bool:
    """Where a configuration does not say it, its class in Transformers does."""
    return name.startswith("Gemma")
