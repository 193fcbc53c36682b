"""Whether a model can be served: its architecture, and its weights' size against ``memory_gib``."""

from __future__ import annotations

import json
import re
from pathlib import Path

from gateway_plugin.catalog import Model
from gateway_plugin.service.checks import Check, Verdict
from gateway_plugin.weights import is_local, split_revision

_TRANSCRIBES_ONLY = frozenset(
    f"{name}ForConditionalGeneration"
    for name in ("Whisper", "CohereAsr", "FireRedASR2", "FunASR", "MossTranscribeDiarize")
)
"""Architectures that vLLM serves on ``/v1/audio/transcriptions`` alone (``supports_transcription_only``)."""
_WHISPER = re.compile(r"(^|[/_-])whisper-(tiny|base|small|medium|large|turbo)|distil-whisper/|faster-whisper", re.I)
_SMALLER_AT_LOAD = ("--quantization", "-q", "--cpu-offload-gb", "--load-format")
"""With these options, weights in memory differ from those on disk."""
_WEIGHTS = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin", "*.bin", "*.gguf")
"""The first pattern with a match counts: some folders hold the same weights twice."""


def kind(model: Model, found: str) -> Check | None:
    """A failed check for a model that its entry's engine or task does not fit; ``None`` if there is no objection.

    ``found``: its folder, or its hub name, which is then the only evidence.
    """
    if model.engine != "vllm":
        return None
    name = f"kind of {model.name}"
    if not is_local(found):
        repository, _ = split_revision(found)
        said = "by its name a Whisper" if _WHISPER.search(repository) else ""
    else:
        said = _transcribes_only(Path(found))
    if said and model.task != "transcribe":
        words = f"{found} is {said}, and the task '{model.task}' is none for it"
        return Check(name, Verdict.FAIL, words, "say task: transcribe in the catalog", configuration=True)
    if is_local(model.source) and _is_pipeline(Path(found)):
        words = f"{found} is a pipeline of diffusers, which vLLM does not serve"
        return Check(name, Verdict.FAIL, words, "say engine: command, with a program that does", configuration=True)
    return None


def _is_pipeline(folder: Path) -> bool:
    return not (folder / "config.json").exists() and (folder / "model_index.json").is_file()


def _transcribes_only(folder: Path) -> str:
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return ""  # vLLM reports what is wrong with it
    only = [str(one) for one in said if str(one) in _TRANSCRIBES_ONLY]
    return f"a model that writes down what is spoken ({only[0]})" if only else ""


def size(model: Model, folder: Path) -> Check | None:
    """A failed check for weights larger than the engine's whole memory; ``None`` if they fit, or that is unknown."""
    if any(word.partition("=")[0].replace("_", "-") in _SMALLER_AT_LOAD for word in model.args):
        return None
    held = next((files for pattern in _WEIGHTS if (files := list(folder.glob(pattern)))), [])
    gib = sum(file.stat().st_size for file in held) / 2**30 / max(1, model.gpus)
    if gib <= model.memory_gib:
        return None
    where = " on each GPU" if model.gpus else ""
    words = f"{gib:.1f} GiB{where}, and memory_gib: {model.memory_gib:g} is for weights, KV cache and all else together"
    return Check(f"size of {model.name}", Verdict.WARN, words, "raise memory_gib in the catalog; see docs/catalog.md")
