"""LoRA adapters on disk: folders in the form of the library PEFT, ``adapter_config.json`` and the weights."""

from __future__ import annotations

import json
from pathlib import Path

from gateway_plugin.catalog import Model
from gateway_plugin.errors import ConfigError

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


def on_disk(model: Model) -> Model:
    """The entry as its engine is started: with whole paths, and with vLLM's options for so many adapters of such a rank
    before its own. Raises ``ConfigError`` for an adapter that is not there.
    """
    if model.adapters is None:
        return model
    found = {name: adapter_folder(name, path) for name, path in model.adapters.items()}
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
