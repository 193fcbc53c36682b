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


class Adapters:
    """Those that are loaded: name -> path."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._can = given.enable_lora and bool(os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"))
        self.loaded: dict[str, str] = dict(module.split("=", 1) for module in given.lora_modules)
        for name, path in self.loaded.items():
            if not _is_one(path):
                sys.exit(f"fake engine: ValueError: no adapter {name} in {path}")

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
        elif not _is_one(path):
            exchange.send(404, json.dumps({"error": {"message": f"No adapter found for {path}"}}).encode())
        else:
            self.loaded[name] = path
            exchange.send(200, b"Success")


def _is_one(path: str) -> bool:
    return (Path(path) / "adapter_config.json").is_file()
