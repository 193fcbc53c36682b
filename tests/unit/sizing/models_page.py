"""``docs/models.md``, from the recipes and the facts of their models: ``python -m tests.unit.sizing.models_page``."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from typing import Any
from unittest import mock

import parsl_configs
from gateway_plugin.recipes.recipes import Recipe, recipes
from gateway_plugin.site import load_site
from gateway_plugin.sizing.architecture import parse_config
from gateway_plugin.sizing.catalog_file import rooms_of
from gateway_plugin.sizing.plan import Fit, Room, Source, Wish, fits
from tests.unit.sizing.published import PUBLISHED

FP8 = {"quantization_config": {"quant_method": "fp8"}}
PACKED_FP8 = {"quantization_config": {"quant_method": "compressed-tensors"}}
MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}

FACTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": ("Llama-3.1-8B", {}),
    "llama-3.2-3b": ("Llama-3.2-3B", {}),
    "llama-3.3-70b": ("Llama-3.3-70B", {}),
    "llama-3.3-70b-fp8": ("Llama-3.3-70B", PACKED_FP8),
    "llama-4-scout": ("Llama-4-Scout", {}),
    "qwen2.5-7b": ("Qwen2.5-7B", {}),
    "qwen2.5-14b": ("Qwen2.5-14B", {}),
    "qwen2.5-72b": ("Qwen2.5-72B", {}),
    "qwen2.5-coder-32b": ("Qwen2.5-32B", {}),
    "qwen2.5-vl-7b": ("Qwen2.5-VL-7B", {}),
    "qwen2.5-vl-72b": ("Qwen2.5-VL-72B", {}),
    "qwen3-4b": ("Qwen3-4B", {}),
    "qwen3-8b": ("Qwen3-8B", {}),
    "qwen3-14b": ("Qwen3-14B", {}),
    "qwen3-32b": ("Qwen3-32B", {}),
    "qwen3-30b-a3b": ("Qwen3-30B-A3B", {}),
    "qwen3-235b-a22b-2507-fp8": ("Qwen3-235B-A22B", {"max_position_embeddings": 262144, **FP8}),
    "qwen3-coder-30b-a3b": ("Qwen3-30B-A3B", {"max_position_embeddings": 262144}),
    "qwen3-vl-8b": ("Qwen3-VL-8B", {}),
    "mistral-7b": ("Mistral-7B-v0.3", {}),
    "mistral-small-3.2-24b": ("Mistral-Small-3.2-24B", {}),
    "devstral-small": ("Mistral-Small-24B", {}),
    "magistral-small": ("Mistral-Small-24B", {}),
    "gemma-3-12b": ("gemma-3-12b", {}),
    "gemma-3-27b": ("gemma-3-27b", {}),
    "gpt-oss-20b": ("gpt-oss-20b", MXFP4),
    "gpt-oss-120b": ("gpt-oss-120b", MXFP4),
    "deepseek-v3.1": ("DeepSeek-V3", FP8),
    "deepseek-r1-0528": ("DeepSeek-V3", FP8),
    "deepseek-r1-distill-qwen-32b": ("Qwen2.5-32B", {"max_position_embeddings": 131072}),
    "deepseek-r1-distill-llama-70b": ("Llama-3.3-70B", {}),
    "phi-4": ("phi-4", {}),
    "phi-4-mini": ("Phi-4-mini", {}),
    "glm-4.5-air-fp8": ("GLM-4.5-Air", PACKED_FP8),
    "seed-oss-36b": ("Seed-OSS-36B", {}),
    "granite-3.3-8b": ("granite-3.3-8b", {}),
    "bge-m3": ("bge-m3", {}),
    "multilingual-e5-large": ("multilingual-e5-large-instruct", {}),
    "qwen3-embedding-0.6b": ("Qwen3-Embedding-0.6B", {}),
    "bge-reranker-v2-m3": ("bge-reranker-v2-m3", {}),
    "qwen3-reranker-0.6b": ("Qwen3-Embedding-0.6B", {"max_position_embeddings": 40960}),
    "whisper-large-v3": ("whisper-large-v3", {}),
    "whisper-large-v3-turbo": ("whisper-large-v3-turbo", {}),
}
"""Recipe -> the published configuration that its model shares, and where its own differs."""

NODES = (
    ("4 x 38", Room("4 x 38", 4, 38 << 30, 0)),
    ("8 x 38", Room("8 x 38", 8, 38 << 30, 0)),
    ("4 x 76", Room("4 x 76", 4, 76 << 30, 0)),
    ("8 x 138", Room("8 x 138", 8, 138 << 30, 0)),
    ("CPU, 200", Room("CPU, 200", 0, 0, 200 << 30)),
)
"""Node types of the page: GPUs and GiB that engines may use of each."""


def source_of(recipe: Recipe) -> Source:
    """As the hub describes it."""
    name, own = FACTS[recipe.name]
    return Source(recipe.source, parse_config({**PUBLISHED[name][1], **own}))


def wish_of(recipe: Recipe) -> Wish:
    """What ``models add`` asks for."""
    args = recipe.args
    advised = args[args.index("--max-model-len") + 1] if "--max-model-len" in args else None
    return Wish(context=int(advised) if advised else None)


def rooms_of_sites() -> Iterator[Room]:
    """The node types of every site in ``parsl_configs``."""
    with mock.patch.dict(os.environ, {"GATEWAY_ACCOUNT": "account"}):
        for module in sorted(one.name for one in pkgutil.iter_modules(parsl_configs.__path__)):
            importlib.import_module(f"parsl_configs.{module}")
            yield from rooms_of(load_site(module))


def _cell(fit: Fit) -> str:
    engine = fit.engine
    if engine is None:
        return "-"
    where = f"{engine.gpus} x {engine.gib:g}" if engine.gpus else f"{engine.gib:g}"
    full = engine.sequences == 4 and not fit.because
    return where if full else f"{where} ({engine.sequences} of {engine.context})"


def page() -> str:
    """The whole page."""
    lines = [HEAD.rstrip(), ""]
    lines += [f"| recipe | model | parameters | context | {' | '.join(name for name, _ in NODES)} |"]
    lines += [f"| --- | --- | --- | --- | {' | '.join('---' for _ in NODES)} |"]
    for recipe in recipes().values():
        source = source_of(recipe)
        found = fits(source, [room for _, room in NODES], wish_of(recipe))
        count = source.architecture.parameters / 1e9
        size = f"{count:.1f}" if count < 20 else f"{count:.0f}"
        context = "30 s" if recipe.task == "transcribe" else str(source.architecture.context)
        cells = " | ".join(_cell(fit) for fit in found)
        lines.append(f"| `{recipe.name}` | [{recipe.source}]({recipe.card}) | {size} | {context} | {cells} |")
    lines += ["", OPTIONS.rstrip(), "", "| recipe | for | options | from |", "| --- | --- | --- | --- |"]
    for recipe in recipes().values():
        task = "" if recipe.task == "generate" else f", `task: {recipe.task}`"
        args = f"`{' '.join(recipe.args)}`" if recipe.args else ""
        where = ", ".join(f"[{_short(one.url)}]({one.url}) ({one.date})" for one in recipe.documents)
        options = ". ".join(filter(None, (args, recipe.note)))
        lines.append(f"| `{recipe.name}` | {recipe.about}{task} | {options} | {where} |")
    return "\n".join(lines) + "\n"


def _short(url: str) -> str:
    if "github.com/vllm-project/recipes" in url:
        return "vLLM's recipe"
    return "model card" if "huggingface.co" in url else "vLLM's documentation"


HEAD = """
# Recipes

Models that people run on clusters now, with the options that their makers and vLLM's documents give:

```
gateway models recipes                 # the list; with --json for programs
gateway models recipes gpt-oss-120b    # one as a catalog entry, with its sources
gateway models add gpt-oss-120b        # into the catalog, with GPUs and memory worked out for your site
```

`add` takes `--context`, `--concurrency`, `--gpus`, `--quantization` and `--as` here, too, and pins the revision that
the hub has today ([memory worked out](catalog.md#memory-worked-out)). Without them room is made for four requests of
16,384 tokens each (of the model's own context if that is less), for fewer where they do not fit: then the table says
for how many of what length.

Columns are nodes by GPUs and GiB that engines may use of each: 4 x 38 are the A100 nodes of Polaris, Perlmutter and
Delta, 8 x 38 those of Delta with eight, 4 x 76 Perlmutter's with 80 GB, 8 x 138 nodes with eight H200. Cells are the
GPUs of an engine and the GiB of each that it takes (`memory_gib`); `-`: it does not fit on such a node, and
`gateway models plan NAME` says why. Parameters are in billions, the context in tokens. The numbers are worked out from
each model's published configuration; the recipes are in `gateway_plugin/recipes/recipes.yaml`.
"""

OPTIONS = """
## Options

Whether tools are called well is up to the model; a parser only reads what it writes. Models that think answer with
`reasoning` beside `content`; give them a longer `--context`.
"""

if __name__ == "__main__":
    print(page(), end="")
