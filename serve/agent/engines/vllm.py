"""vLLM: ``python -m vllm.entrypoints.openai.api_server``. It serves mutual TLS itself."""

from __future__ import annotations

from gateway_plugin.adapters import adapter_words
from serve.agent.engines.start import Start

_CPU_KV_CACHE_BYTES = 2**30
"""Without a GPU, unless the catalog sets it; vLLM's default is nearly all of the machine."""
_GPU_SHARE_MAX = 0.95
_NO_DOMAIN = "none.invalid"
"""No host has a name in ``.invalid`` (RFC 6761). To vLLM an empty list means every host."""


def argv(start: Start) -> tuple[str, ...]:
    """The command line."""
    model, bind, tls = start.model, start.bind, start.tls
    revision = start.revision
    return (
        start.python,
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", start.name),
        *(("--revision", revision, "--tokenizer-revision", revision) if revision else ()),
        *("--served-model-name", *start.served),
        *("--host", bind.host),
        *("--port", str(bind.port)),
        *("--ssl-keyfile", str(tls.key)),
        *("--ssl-certfile", str(tls.certificate)),
        *("--ssl-ca-certs", str(tls.authority)),
        *("--ssl-cert-reqs", "2"),  # ssl.CERT_REQUIRED, on every path: its key guards only some of them
        "--disable-fastapi-docs",
        "--disable-uvicorn-access-log",
        *("--allowed-media-domains", _NO_DOMAIN),  # a caller's image_url must not reach hosts in the cluster
        *_devices(start),
        *_lora(start),
        # vLLM on CPU refuses it. With its development endpoints on, it logs a traceback with each refused request.
        *(("--enable-sleep-mode", "--no-log-error-stack") if start.sleeps and model.gpus else ()),
        *model.args,  # last: of two, vLLM takes the later
    )


def _lora(start: Start) -> tuple[str, ...]:
    adapters = start.model.adapters
    if adapters is None:
        return ()
    return ("--enable-lora", *(("--lora-modules", *adapter_words(adapters)) if adapters else ()))


def _devices(start: Start) -> tuple[str, ...]:
    gpus = start.model.gpus
    if not gpus:
        kv_cache = ("--kv-cache-memory-bytes", str(_CPU_KV_CACHE_BYTES))
        return ("--dtype", "float32", "--enforce-eager", *kv_cache)  # bfloat16 is slow on AVX2
    share = start.share(_GPU_SHARE_MAX)
    return (
        *(("--tensor-parallel-size", str(gpus)) if gpus > 1 else ()),
        *(("--gpu-memory-utilization", f"{share:.3f}") if share is not None else ()),
    )
