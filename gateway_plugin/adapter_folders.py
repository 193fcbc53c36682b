"""LoRA adapters on disk: folders in the form of the library PEFT, ``adapter_config.json`` and the weights."""

from __future__ import annotations

import json
from pathlib import Path

from gateway_plugin.catalog import Model
from gateway_plugin.errors import ConfigError
from gateway_plugin.weights import is_local, resolve

CONFIG = "adapter_config.json"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``--max-lora-rank`` (``MaxLoRARanks``)."""
_RANK = 16
"""vLLM's default of it."""
_IN_A_BATCH = 4
"""Adapters that one step computes at most; each takes GPU memory in advance. vLLM's default of 1 makes requests for
different adapters of one base wait for each other."""
_IN_MEMORY = 16
"""Adapters that vLLM keeps in host memory; others are read from disk again."""
_CONFIG_BYTES = 1 << 20
_HEADER_BYTES = 32 << 20
_PLAIN = frozenset({"F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""Types of weights that are not packed: their shapes are those of the matrix."""


def adapter_folder(name: str, path: str) -> tuple[Path, int]:
    """An adapter's folder and its rank. Raises ``ConfigError``: there is no adapter."""
    folder = Path(path).expanduser()
    try:
        with (folder / CONFIG).open("rb") as file:
            said = json.loads(file.read(_CONFIG_BYTES))
        rank = said.get("r", _RANK)
    except (OSError, ValueError, RecursionError, AttributeError):
        raise ConfigError(
            f"adapters.{name}: there is no LoRA adapter in {folder}: no {CONFIG} that can be read; correct its folder"
        ) from None
    return folder, rank if type(rank) is int and rank > 0 else _RANK


def fitting_folder(model: Model, name: str, path: str) -> tuple[Path, int]:
    """``adapter_folder``, whose shapes are compared with its base's where both are safetensors on this machine's disk.

    vLLM 0.32 loads an adapter of smaller shapes, and its answers are wrong.
    """
    folder, rank = adapter_folder(name, path)
    try:
        base = Path(resolve(model)) if is_local(model.source) else None
    except ConfigError:
        base = None  # that is an error of its own
    if base is not None and (wrong := misfit(folder, base)):
        raise ConfigError(f"adapters.{name}: {folder} is another base's adapter: {wrong}; correct its folder")
    return folder, rank


def misfit(folder: Path, base: Path) -> str:
    """The first tensor of the adapter in ``folder`` that does not fit the weights in ``base``; ``""``: none is seen."""
    pairs: dict[str, tuple[str, int, int]] = {}
    for tensor, (_, shape) in _header(folder / "adapter_model.safetensors").items():
        module, _, matrix = tensor.removeprefix("base_model.model.").partition(".lora_")
        if matrix in ("A.weight", "B.weight") and len(shape) == 2:
            pairs[tensor] = (f"{module}.weight", *((1, shape[1]) if matrix[0] == "A" else (0, shape[0])))
    wanted = {weight for weight, _, _ in pairs.values()}
    weights: dict[str, tuple[str, list[int]]] = {}
    for file in sorted(base.glob("*.safetensors")):
        if wanted <= weights.keys():
            break
        weights.update((name, found) for name, found in _header(file).items() if name in wanted)
    for tensor, (weight, side, size) in pairs.items():
        kind, shape = weights.get(weight, ("", []))
        if kind in _PLAIN and len(shape) == 2 and shape[side] != size:
            return f"{tensor} is for {size} values, and {weight} has {shape[side]}"
    return ""


def _header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor in a safetensors file; empty where it cannot be read.

    Format: https://huggingface.co/docs/safetensors (8 bytes of length, then JSON).
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            said = json.loads(opened.read(length)) if length <= _HEADER_BYTES else {}
        return {
            name: (str(one["dtype"]), [int(size) for size in one["shape"]])
            for name, one in said.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def on_disk(model: Model) -> Model:
    """The entry as its engine is started: with whole paths, and with vLLM's options for so many adapters of such a rank
    before its own. Raises ``ConfigError`` for an adapter that is not there, or is another base's.
    """
    if model.adapters is None:
        return model
    found = {name: fitting_folder(model, name, path) for name, path in model.adapters.items()}
    folders = {name: str(folder) for name, (folder, _) in found.items()}
    changes: dict[str, object] = {"adapters": folders}
    if model.engine == "vllm":
        changes["args"] = (*_sizes([rank for _, rank in found.values()]), *model.args)
    return model.model_copy(update=changes)


def _sizes(ranks: list[int]) -> tuple[str, ...]:
    most = max([_RANK, *ranks])
    rank = next((one for one in _RANKS if one >= most), most)
    batch, memory = min(max(1, len(ranks)), _IN_A_BATCH), max(_IN_MEMORY, len(ranks))
    return ("--max-loras", str(batch), "--max-cpu-loras", str(memory), "--max-lora-rank", str(rank))
