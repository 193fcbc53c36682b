"""SGLang: ``python -m sglang.launch_server`` (docs.sglang.io, "Server arguments"). It demands no client certificate."""

from __future__ import annotations

from serve.agent.engines.start import Start

_GPU_SHARE_MAX = 0.95
_STATIC = 0.9
"""``--mem-fraction-static`` covers weights and KV cache alone; the rest is for activations and CUDA graphs."""


def argv(start: Start) -> tuple[str, ...]:
    """The command line. It serves one name; it does not compare it with a request's."""
    model = start.model
    share = start.share(_GPU_SHARE_MAX)
    return (
        start.python,
        *("-m", "sglang.launch_server"),
        *("--model-path", start.name),
        *(("--revision", start.revision) if start.revision else ()),
        *("--served-model-name", model.name),
        *("--host", start.bind.host),
        *("--port", str(start.bind.port)),
        "--enable-metrics",
        *(("--is-embedding",) if model.task in ("embed", "rerank") else ()),
        *(("--device", "cpu") if not model.gpus else ()),
        *(("--tp-size", str(model.gpus)) if model.gpus > 1 else ()),
        *(("--mem-fraction-static", f"{share * _STATIC:.3f}") if model.gpus and share is not None else ()),
        *model.args,
    )
