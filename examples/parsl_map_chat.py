"""Many prompts in one Parsl task: ``map_chat`` keeps several requests in flight, and the engine batches them.

    python examples/parsl_map_chat.py

The task runs in worker processes here (HighThroughputExecutor), as it would on a cluster's nodes. A prompt that fails
does not take the others with it: ``return_errors=True`` puts the error in its place.
"""

import os
import sys
import time
from pathlib import Path

import parsl
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider

from gateway_plugin.apps import map_chat
from gateway_plugin.errors import GatewayError

MODEL = "smollm2-135m-instruct"
TEXTS = Path(__file__).parent / "texts"

# Parsl starts its programs by name; they lie beside this interpreter.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

config = Config(
    [HighThroughputExecutor(address="127.0.0.1", max_workers_per_node=1, provider=LocalProvider(max_blocks=1))],
    run_dir="build/runinfo",
)

if __name__ == "__main__":
    texts = [file.read_text(encoding="utf-8").strip() for file in sorted(TEXTS.glob("*.txt"))]
    began = time.monotonic()
    with parsl.load(config):
        titles = map_chat(
            texts, MODEL, system="Give the text a title of at most five words.", concurrency=8, return_errors=True,
            temperature=0, max_tokens=16,
        )  # fmt: skip
        for text, title in zip(texts, titles.result(), strict=True):
            shown = f"({title.code}) {title.message}" if isinstance(title, GatewayError) else title
            print(f"{shown.strip():45}  {text[:70]}...")
    print(f"{len(texts)} answers in {time.monotonic() - began:.1f} s")
