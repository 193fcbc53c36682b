"""llama.cpp: ``llama-server`` (tools/server/README.md of ggml-org/llama.cpp). It demands no client certificate."""

from __future__ import annotations

from gateway_plugin.weights import is_local
from serve.agent.engines.start import Start

_TASKS = {"embed": "--embedding", "rerank": "--reranking"}


def argv(start: Start) -> tuple[str, ...]:
    """The command line. Weights: a GGUF file, or a hub name with a quantization, ``org/name:Q4_K_M``."""
    model = start.model
    weights = ("--model", start.source) if is_local(start.source) else ("--hf-repo", start.source)
    return (
        "llama-server",
        *weights,
        *("--alias", ",".join(start.served)),
        *("--host", start.bind.socket),  # it takes an address that ends with .sock for a path
        "--metrics",
        "--no-webui",
        *((_TASKS[model.task],) if model.task in _TASKS else ()),
        *(("--n-gpu-layers", "0") if not model.gpus else ()),
        *model.args,
    )
