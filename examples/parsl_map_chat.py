"""Many prompts in one Parsl task: ``map_chat`` keeps several requests in flight, and the engine batches them.

    python examples/parsl_map_chat.py

The task runs in a worker process here (HighThroughputExecutor), as it would on a cluster's node. A prompt that fails
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
COUNTRIES = ("France", "Italy", "Japan", "Spain", "Egypt", "Germany", "Greece", "Portugal", "Austria", "Norway")

# Parsl starts its programs by name; they lie beside this interpreter.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

config = Config(
    [HighThroughputExecutor(address="127.0.0.1", max_workers_per_node=1, provider=LocalProvider(max_blocks=1))],
    run_dir="build/runinfo",
)

if __name__ == "__main__":
    prompts = [f"What is the capital of {country}?" for country in COUNTRIES]
    began = time.monotonic()
    with parsl.load(config):
        answers = map_chat(prompts, MODEL, concurrency=8, return_errors=True, temperature=0, max_tokens=24).result()
    for prompt, answer in zip(prompts, answers, strict=True):
        shown = f"({answer.code}) {answer.message}" if isinstance(answer, GatewayError) else answer
        print(f"{prompt:36} {shown.strip()}")
    print(f"{len(prompts)} answers in {time.monotonic() - began:.1f} s")
