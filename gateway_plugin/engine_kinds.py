"""Kinds of engines: the programs that a catalog entry may name, and what each can do. Pure.

How each is started is in ``serve.agent.argv``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["generate", "embed", "rerank", "transcribe", "speak", "image"]
"""What a model is for: chat and completions, vectors, ranking, text of speech, speech of text, images of text."""
Engine = Literal["vllm", "command"]


@dataclass(frozen=True)
class EngineKind:
    """One program."""

    name: str
    tasks: frozenset[Task]
    """What it can serve."""
    mutual_tls: bool
    """It serves TLS, demands the gateway's client certificate and takes its key from ``VLLM_API_KEY`` by itself."""
    sleeps: bool
    """It frees its GPUs' memory on request and takes it back."""


KINDS: dict[str, EngineKind] = {
    kind.name: kind
    for kind in (
        EngineKind("vllm", frozenset({"generate", "embed", "rerank", "transcribe"}), mutual_tls=True, sleeps=True),
        EngineKind(
            "command",
            frozenset({"generate", "embed", "rerank", "transcribe", "speak", "image"}),
            mutual_tls=True,
            sleeps=False,
        ),
    )
}
