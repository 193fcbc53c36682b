"""Options of each engine that are the gateway's own: an entry's ``args`` may not have them. Pure.

The engine gets ``args`` last and uses the later of two equal options: it would listen elsewhere, expect another key or
take other GPUs. vLLM's and SGLang's parser (argparse) accept underscores and prefixes, the others whole names alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

OWN = "the gateway gives this itself; leave it out"
ONE_NODE = "an engine has GPUs of one node and splits each layer over them; say gpus:"
HTTP = "the gateway speaks HTTP to one server; leave it out"
SHARE = "say memory_gib: (GiB of each GPU)"
GPUS = "say gpus:"
NAMES = "say it by the entry's own name and aliases:"
TOKEN = "every user of the node can read it there; say env: {HF_TOKEN: ...}"  # noqa: S105 - a message
FILE = "a file that is not checked here; put its options into args:"
SOURCE = "say source:"
REVISION = "say source: org/name@REVISION"
TASK = "say task:"


def _each(reason: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, reason)


@dataclass(frozen=True)
class Reserved:
    """What of one program's options is reserved, and why."""

    options: Mapping[str, str]
    """By the name after ``--``."""
    families: Mapping[str, str] = field(default_factory=dict)
    """By the beginning of the name."""
    short: Mapping[str, str] = field(default_factory=dict)
    """By the name after ``-``."""
    short_free: frozenset[str] = frozenset()
    """Short options that no reserved one's name begins with, though it looks so."""
    glued: str = ""
    """Short options that take their value without a blank (``-n2``)."""
    prefixes: bool = False
    """Its parser accepts a prefix that only one option has."""
    after: str = ""
    """The command line that ``args`` continue."""


VLLM = Reserved(
    options={
        **_each(OWN, "host", "port", "uds", "api-key", "enable-ssl-refresh"),
        **_each(OWN, "ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-cert-reqs", "ssl-ciphers"),
        **_each(HTTP, "grpc", "grpc-port", "headless"),
        **_each(ONE_NODE, "pipeline-parallel-size", "prefill-context-parallel-size", "device-ids"),
        **_each(ONE_NODE, "nnodes", "node-rank", "master-addr", "master-port", "data-parallel-size"),
        **_each(SHARE, "gpu-memory-utilization", "device-memory-utilization"),
        "tensor-parallel-size": GPUS,
        "model": SOURCE,
        "revision": REVISION,
        "served-model-name": NAMES,
        "hf-token": TOKEN,
        "config": FILE,
    },
    families={"ssl-": OWN, "data-parallel-": ONE_NODE},
    short={
        **_each(ONE_NODE, "n", "r", "pp", "pcp", "dp", "dpn", "dpr", "dpl", "dpa", "dpp", "dpb", "dph", "dpe", "dpm"),
        "tp": GPUS,
    },
    short_free=frozenset({"asc", "q", "dcp", "ep", "sc", "dc", "cc", "ac", "O"}),
    glued="nr",
    prefixes=True,
    after="vllm serve MODEL",
)
SGLANG = Reserved(  # docs.sglang.io, "Server arguments"
    options={
        **_each(OWN, "host", "port", "api-key", "admin-api-key", "enable-ssl-refresh", "fastapi-root-path"),
        **_each(OWN, "ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-keyfile-password", "enable-metrics"),
        **_each(HTTP, "grpc-mode", "grpc-port", "smg-grpc-mode", "enable-http2", "sidecar"),
        **_each(ONE_NODE, "pipeline-parallel-size", "pp-size", "nnodes", "node-rank", "dist-init-addr"),
        **_each(ONE_NODE, "nccl-init-addr", "base-gpu-id", "gpu-id-step"),
        **_each(GPUS, "tensor-parallel-size", "tp-size"),
        "mem-fraction-static": SHARE,
        **_each(SOURCE, "model-path", "model"),
        "revision": REVISION,
        "served-model-name": NAMES,
        "is-embedding": TASK,
        "config": FILE,
    },
    families={"ssl-": OWN, "disaggregation-": HTTP},
    prefixes=True,
    after="python -m sglang.launch_server",
)
LLAMA_CPP = Reserved(  # llama.cpp, tools/server/README.md
    options={
        **_each(OWN, "host", "port", "reuse-port", "api-key", "api-key-file", "ssl-key-file", "ssl-cert-file"),
        **_each(OWN, "api-prefix", "path", "metrics"),
        **_each(SOURCE, "model", "model-url", "docker-repo", "hf-repo", "hf-file"),
        **_each(HTTP, "models-dir", "models-preset", "models-max", "rpc"),
        **_each(NAMES, "alias"),
        **_each(GPUS, "device", "main-gpu"),
        **_each(TASK, "embedding", "embeddings", "rerank", "reranking"),
        **_each("it lets callers run programs on the node; leave it out", "tools", "agent", "mcp-servers-config"),
        **_each("it lets callers reach hosts in the cluster; leave it out", "ui-mcp-proxy", "webui-mcp-proxy"),
        "mcp-servers-json": "it lets callers run programs on the node; leave it out",
        "hf-token": TOKEN,
    },
    short={
        **_each(SOURCE, "m", "mu", "dr", "hf", "hfr", "hff"),
        **_each(GPUS, "dev", "mg"),
        **_each("it lets callers run programs on the node; leave it out", "ag"),
        "a": NAMES,
        "hft": TOKEN,
    },
    after="llama-server",
)
TRANSFORMERS = Reserved(  # transformers 5.19, cli/serve.py
    options={
        **_each(OWN, "host", "port", "enable-cors", "non-blocking", "model-timeout"),
        "device": GPUS,
        "force-model": SOURCE,
    },
    after="transformers serve MODEL",
)
WHISPER = Reserved(  # uvicorn's command line
    options={
        **_each(OWN, "host", "port", "uds", "fd", "factory", "app-dir", "root-path", "env-file", "reload"),
        **_each(HTTP, "workers"),
    },
    families={"ssl-": OWN, "reload-": OWN},
    after="uvicorn faster_whisper_server.api:app",
)
RESERVED: dict[str, Reserved] = {
    "vllm": VLLM,
    "sglang": SGLANG,
    "llama.cpp": LLAMA_CPP,
    "transformers": TRANSFORMERS,
    "whisper": WHISPER,
}
"""By engine. A ``command`` is the site's own."""


def reserved_words(engine: str, args: Sequence[str], gpus: int) -> str:
    """Every option of ``args`` that is reserved for the gateway, grouped by reason; ``""``: none."""
    table = RESERVED.get(engine)
    if table is None or not args:
        return ""
    if not args[0].startswith("-"):
        return f"{args[0]!r} is no option; expected the options that come after '{table.after}'"
    by_reason: dict[str, list[str]] = {}
    for place, word in enumerate(args):
        said, given, value = word.partition("=")
        value = value if given else next(iter(args[place + 1 : place + 2]), "")
        if (reason := _reason(table, said, value)) is None:
            continue
        if reason == GPUS and value.isdecimal():
            reason = f"'gpus: {gpus}' says it; leave it out" if value == str(gpus) else f"say gpus: {value}"
        if said not in by_reason.setdefault(reason, []):
            by_reason[reason].append(said)
    return "; ".join(f"{', '.join(words)}: {reason}" for reason, words in by_reason.items())


_BACKEND = "distributed-executor-backend"


def _reason(table: Reserved, word: str, value: str) -> str | None:
    """Why an option is reserved for the gateway; ``None``: it is not, or is a value. ``word``: without ``=value``."""
    if not re.match(r"--?[A-Za-z_]|--$", word):
        return None
    if not word.startswith("--"):
        name = word[1:]
        if name[0] in table.glued:  # no other option of vLLM's has these initials
            return ONE_NODE
        return None if name in table.short_free else _of(table, name, table.short)
    name = word[2:].partition(".")[0].replace("_", "-")
    if not name:
        return "what comes after it is no option; leave it out"
    if table is VLLM and _BACKEND.startswith(name) and value == "ray":
        return "an engine is on one node, and the gateway's Ray is not its own; leave it out"
    family = next((reason for start, reason in table.families.items() if name.startswith(start)), None)
    return family or _of(table, name, table.options)


def _of(table: Reserved, name: str, options: Mapping[str, str]) -> str | None:
    """By the full name, or where its parser takes them, by a prefix."""
    beginnings = (reason for full, reason in options.items() if table.prefixes and full.startswith(name))
    return options.get(name) or next(beginnings, None)
