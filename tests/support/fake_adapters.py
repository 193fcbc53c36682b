"""A fake engine's LoRA adapters, with vLLM's options, paths and answers.

An adapter is a folder with ``adapter_config.json``. ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter`` are there
with ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.support.raw_http import Exchange

_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def add_options(parser: argparse.ArgumentParser) -> None:
    """vLLM's."""
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--lora-modules", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--max-lora-rank", type=int, default=16)


class Adapters:
    """Those that are loaded: name -> path."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._can = given.enable_lora and bool(os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"))
        self.loaded: dict[str, str] = dict(module.split("=", 1) for module in given.lora_modules)
        self._most = given.max_lora_rank
        for name, path in self.loaded.items():
            if wrong := self._wrong(path):
                sys.exit(f"fake engine: ValueError: {name}: {wrong}")

    def cards(self, base: str) -> list[dict[str, Any]]:
        """For ``/v1/models``."""
        return [{"id": name, "object": "model", "root": path, "parent": base} for name, path in self.loaded.items()]

    def takes(self, exchange: Exchange) -> bool:
        """Whether this is one of its paths."""
        return self._can and exchange.request.method == "POST" and exchange.request.path in (_LOAD, _UNLOAD)

    def __call__(self, exchange: Exchange) -> None:
        body = json.loads(exchange.request.body)
        name, path = body["lora_name"], body.get("lora_path", "")
        if exchange.request.path == _UNLOAD:
            known = self.loaded.pop(name, None)
            exchange.send(200 if known is not None else 404, b"{}")
        elif name in self.loaded:
            exchange.send(400, b'{"error": {"message": "has already been loaded"}}')
        elif wrong := self._wrong(path):
            exchange.send(500, json.dumps({"error": {"message": wrong}}).encode())
        else:
            self.loaded[name] = path
            exchange.send(200, b"Success")

    def _wrong(self, path: str) -> str:
        folder = Path(path)
        try:
            rank = json.loads((folder / "adapter_config.json").read_text()).get("r", 8)
        except (OSError, ValueError):
            return f"No adapter found for {path}"
        if not (folder / "adapter_model.safetensors").is_file():
            return f"{folder} doesn't contain tensors"
        return f"LoRA rank {rank} is greater than max_lora_rank {self._most}." if rank > self._most else ""
