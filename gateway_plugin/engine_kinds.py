"""Kinds of engines: the programs that a catalog entry may name, and what each can do. Pure.

How each is started is in ``serve.agent.engines``; which options an entry may not set, in ``engine_reserved``. A program
that cannot demand a client certificate gets a HAProxy in front on its node (``serve.agent.doorman``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Task = Literal["generate", "embed", "rerank", "transcribe", "speak", "image"]
"""What a model is for: chat and completions, vectors, ranking, text of speech, speech of text, images of text."""
Engine = Literal["vllm", "sglang", "llama.cpp", "transformers", "whisper", "command"]
TASKS: tuple[Task, ...] = ("generate", "embed", "rerank", "transcribe", "speak", "image")


@dataclass(frozen=True)
class EngineKind:
    """One program."""

    name: str
    tasks: frozenset[Task]
    """What it can serve."""
    mutual_tls: bool = False
    """It serves TLS, demands the gateway's client certificate and takes its key from ``VLLM_API_KEY`` by itself."""
    sleeps: bool = False
    """It frees its GPUs' memory on request and takes it back."""
    on_socket: bool = False
    """It listens on a Unix socket, which no other user of its node can reach; else on loopback."""
    metrics: bool = False
    """It has ``GET /metrics`` with vLLM's names, from which its agent reads its progress."""
    deaf_while_busy: bool = False
    """It answers nothing, ``GET /health`` neither, while it works on a request."""
    at_a_time: tuple[str, ...] = ()
    """Its option for how many requests it works on at a time, in every spelling, without dashes."""
    at_a_time_default: int | None = None
    """Without that option; ``None``: not known, or it depends on the device."""


KINDS: dict[str, EngineKind] = {
    kind.name: kind
    for kind in (
        EngineKind(
            "vllm",
            frozenset({"generate", "embed", "rerank", "transcribe"}),
            mutual_tls=True,
            sleeps=True,
            metrics=True,
            at_a_time=("max-num-seqs", "max-num-seq", "max-num-se"),  # its parser takes prefixes
        ),
        # docs.sglang.io, "Server arguments": it has --ssl-keyfile, and no option that demands a client's certificate.
        EngineKind(
            "sglang",
            frozenset({"generate", "embed", "rerank", "transcribe"}),
            at_a_time=("max-running-requests", "max-running-request"),
        ),
        # llama.cpp, tools/server/README.md: --host takes a path that ends with .sock; "auto" is four slots.
        EngineKind(
            "llama.cpp",
            frozenset({"generate", "embed", "rerank"}),
            on_socket=True,
            at_a_time=("parallel", "np", "n-parallel"),
            at_a_time_default=4,
        ),
        # Without --continuous-batching one thread generates for one request after the other.
        EngineKind("transformers", frozenset({"generate", "transcribe"}), on_socket=True, at_a_time_default=1),
        # faster-whisper-server transcribes in its event loop.
        EngineKind(
            "whisper", frozenset({"transcribe"}), on_socket=True, deaf_while_busy=True, at_a_time_default=1
        ),
        EngineKind("command", frozenset(TASKS), at_a_time=("max-num-seqs", "max-num-seq", "max-num-se")),
    )
}  # fmt: skip


def serves_tls(engine: str, command: Sequence[str]) -> bool:
    """Whether an entry's program serves mutual TLS by itself: by its kind, or because its ``command`` names the
    certificate. Behind a doorman else."""
    return KINDS[engine].mutual_tls or any("{keyfile}" in word or "{certfile}" in word for word in command)


def on_socket(engine: str, command: Sequence[str]) -> bool:
    """Whether an entry's program listens on a Unix socket, for its doorman alone."""
    return KINDS[engine].on_socket or any("{socket}" in word for word in command)
