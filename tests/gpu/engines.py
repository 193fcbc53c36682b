"""Real vLLM engines on a GPU, started with the agent's own command line, with random weights of any size."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import os
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gateway_plugin.catalog import Model
from gateway_plugin.paths import Layout
from serve.agent.argv import Bind, TlsFiles, engine_argv, engine_env
from serve.agent.probe import Probe, client_context
from serve.agent.processes import tail
from serve.agent.sleeping import Asleep, Awake, Canary, Sleeper, used_mib_of
from tests.support.agents import KEY, NAMED, engine_client


@dataclass(frozen=True)
class Size:
    """A Qwen3-like model: shape as published, weights random."""

    name: str
    hidden: int
    layers: int
    heads: int
    inner: int
    memory_gib: float
    """What the catalog would give it: weights in bfloat16, 6 GiB or more of KV cache, graphs."""
    tied: bool = False
    words: int = 151_936

    @property
    def weights_gib(self) -> float:
        """Of the layers' matrices and the vocabulary, two bytes a number; 8 KV heads of 128."""
        layer = self.hidden * (2 * self.heads * 128 + 2 * 8 * 128 + 3 * self.inner)
        return 2 * (self.layers * layer + (1 if self.tied else 2) * self.words * self.hidden) / 2**30


SIZES = {
    "tiny": Size("tiny", 1024, 4, 16, 3072, 4.0, tied=True),
    "8b": Size("8b", 4096, 36, 32, 12_288, 24.0),
    "8b-wide": Size("8b", 4096, 36, 32, 12_288, 70.0),
    "32b": Size("32b", 5120, 64, 64, 25_600, 71.0),
}


def write_model(folder: Path, size: Size) -> Path:
    """A model's folder without weights, for ``--load-format dummy``: vLLM draws the same random ones at every start.

    The tokenizer has one word for each number of the vocabulary, so that each token that random weights choose is text.
    """
    folder.mkdir(parents=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": size.words,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "hidden_act": "silu",
        "tie_word_embeddings": size.tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "Hi": 3, **{f"w{i}": i for i in range(4, size.words)}}
    special = [
        {"id": i, "content": word, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, word in enumerate(("<unk>", "<s>", "</s>"))
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    for name, content in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", named)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@dataclass(frozen=True)
class Gpu:
    """The GPU of these tests."""

    uuid: str
    name: str
    total_mib: int


@functools.cache
def first_gpu() -> Gpu | str:
    """This machine's first GPU, or why there is none."""
    argv = ("nvidia-smi", "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits")
    try:
        said = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout
        uuid, name, total = said.splitlines()[0].split(", ")
        return Gpu(uuid, name, int(total))
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        return f"no NVIDIA GPU here: nvidia-smi: {error}"


@dataclass
class Engine:
    """One vLLM on the GPU, as the agent would start it."""

    name: str
    size: Size
    source: Path
    layout: Layout
    gpu: Gpu
    cache: Path
    """Where it keeps what it compiled."""
    log: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    canary: Canary = field(default_factory=lambda: Canary("", ()))
    asleep: Asleep = field(default_factory=lambda: Asleep((), 0.0))

    def launch(self) -> None:
        """Start the process."""
        args = ("--load-format", "dummy", "--max-model-len", "4096", "--max-num-seqs", "64")
        entry = {"name": self.name, "source": str(self.source), "gpus": 1, "memory_gib": self.size.memory_gib}
        model = Model.model_validate({**entry, "args": args, "env": {"VLLM_CACHE_ROOT": str(self.cache)}})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            bind = Bind("127.0.0.1", free.getsockname()[1])
        tls = TlsFiles(self.layout.engine_key, self.layout.engine_certificate, self.layout.ca)
        argv = engine_argv(model, str(self.source), bind, tls, self.gpu.total_mib, sleeps=True)
        env = engine_env(model, KEY, (0,), (self.gpu.uuid,), {**os.environ, **self.environ}, sleeps=True)
        self.address = bind.address
        self.loop = asyncio.new_event_loop()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True)
        self.probe = Probe(bind.address, client_context(self.layout), KEY)
        self.sleeper = Sleeper(self.probe, self.name, "generate", lambda: used_mib_of((self.gpu.uuid,)))

    def start(self, timeout_s: float) -> float:
        """Start it and wait until it answers; note its canary. Returns the seconds."""
        begun = time.monotonic()
        self.launch()
        assert self.process is not None
        while not self.loop.run_until_complete(self.probe.health(5.0)).ok:
            ended = self.process.poll()
            assert ended is None, f"{self.name} ended with {ended}:\n{tail(self.log)[-4000:]}"
            assert time.monotonic() - begun < timeout_s, f"not ready: {tail(self.log)[-4000:]}"
            time.sleep(0.1)
        noted = self.loop.run_until_complete(self.sleeper.note())
        assert isinstance(noted, Canary), noted
        self.canary = noted
        return time.monotonic() - begun

    def sleep(self) -> Asleep:
        """Put it to sleep; it must."""
        done = self.loop.run_until_complete(self.sleeper.fall_asleep(int(self.size.memory_gib * 1024)))
        assert isinstance(done, Asleep), done
        self.asleep = done
        return done

    def wake(self) -> Awake:
        """Wake it; it must answer as before."""
        done = self.loop.run_until_complete(self.sleeper.wake(self.asleep, self.canary))
        assert isinstance(done, Awake), done
        return done

    def post(self, path: str) -> int:
        """Ask it something of its development endpoints; the status."""
        return self.loop.run_until_complete(self.probe.call("POST", path, None, 120.0))[0]

    def used_mib(self) -> int:
        """Memory in use on the GPU."""
        return asyncio.run(used_mib_of((self.gpu.uuid,)))[0]

    def stop(self) -> float:
        """End it with all that it started. Returns the seconds until the process is gone."""
        begun = time.monotonic()
        if self.process is not None:
            children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
            self.loop.run_until_complete(self.probe.close())  # vLLM waits for the other side's farewell
            self.loop.close()
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(30)
            for child in children:
                if child.is_running():
                    child.kill()
            psutil.wait_procs(children, 30)
            self.process = None
        return time.monotonic() - begun


class Completion(threading.Thread):
    """One streamed completion, begun when it is made."""

    def __init__(self, engine: Engine, prompt: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self.begun = threading.Event()
        """It has a first token."""
        self.tokens = 0
        """Of its answer, as the engine counts them when it is whole."""
        self.ended_at = math.inf
        self._engine = engine
        self._asked = {
            "model": engine.name,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self.start()

    def run(self) -> None:
        """Read it to its end."""
        with (
            engine_client(self._engine.layout, self._engine.address) as client,
            client.stream("POST", "/v1/completions", json=self._asked, extensions=NAMED) as answer,
        ):
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    told = json.loads(line.removeprefix("data: "))
                    self.begun.set()
                    if told.get("usage"):  # in the last one
                        self.tokens = told["usage"]["completion_tokens"]
        self.ended_at = time.monotonic()


def make(name: str, size: str, folder: Path, layout: Layout) -> Engine:
    """An engine, not started, with everything of its own in ``folder``."""
    gpu = first_gpu()
    assert isinstance(gpu, Gpu), gpu
    source = write_model(folder / "model", SIZES[size])
    return Engine(name, SIZES[size], source, layout, gpu, folder / "cache", folder / "engine.log")


def host_used_mib() -> int:
    """Memory in use on this machine; what CUDA pins is in no process's own count."""
    memory = psutil.virtual_memory()
    return (memory.total - memory.available) >> 20


class Figures:
    """What was measured: printed as it comes, and kept in ``GPU_FIGURES`` (a file) if that is given."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._file = os.environ.get("GPU_FIGURES")

    def __call__(self, what: str, **values: Any) -> None:
        rounded = {name: round(value, 2) if isinstance(value, float) else value for name, value in values.items()}
        line = json.dumps({"what": what, **rounded, "at_s": round(time.monotonic() - self._begun, 1)})
        print(f"\nmeasured {line}", flush=True)
        if self._file:
            with open(self._file, "a", encoding="utf-8") as stream:
                stream.write(line + "\n")
