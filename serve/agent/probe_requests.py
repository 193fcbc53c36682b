"""The small requests that show whether an engine serves its task, and what counts as an answer. Pure."""

from __future__ import annotations

import io
import json
import math
import struct
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from gateway_plugin.engine_kinds import Task

_RATE_HZ = 16_000
_TONE_HZ = 440.0


@dataclass(frozen=True)
class Trial:
    """One request: a JSON body, or a form with a file."""

    path: str
    body: Mapping[str, Any]
    file: bytes = b""
    """The field ``file`` of a form, whose other fields are ``body``; empty: no form."""


def trials(model: str, task: Task) -> tuple[Trial, ...]:
    """The requests to try until one is answered. None for images: one takes minutes on some devices; an engine of
    images is ready once its health is good."""
    if task == "embed":
        return (Trial("/v1/embeddings", {"model": model, "input": ["ready?"]}),)
    if task == "rerank":
        body = {"model": model, "query": "ready?", "documents": ["ready"]}
        return (Trial("/v1/rerank", body), Trial("/rerank", body))
    if task == "transcribe":
        return (Trial("/v1/audio/transcriptions", {"model": model, "temperature": "0"}, tone()),)
    if task == "speak":
        return (Trial("/v1/audio/speech", {"model": model, "input": "Hi", "voice": "alloy"}),)
    if task == "image":
        return ()
    message = {"role": "user", "content": "Hi"}
    return (  # the plain one first: a base model has no chat template
        Trial("/v1/completions", {"model": model, "prompt": "Hi", "max_tokens": 1}),
        Trial("/v1/chat/completions", {"model": model, "messages": [message], "max_tokens": 1}),
    )


def answered(task: Task, status: int, answer: bytes) -> bool:
    """Whether this is an answer to a trial.

    Names of voices differ from program to program: one that refuses ours (400, 422) read the request.
    """
    if task == "speak":
        return (status == 200 and bool(answer)) or status in (400, 422)
    if status != 200:
        return False
    try:
        body = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    if task == "rerank":
        found = (body.get("results") or body.get("data")) if isinstance(body, dict) else body
        return isinstance(found, list) and bool(found)
    if task == "transcribe":  # a tone has none
        return isinstance(body, dict) and isinstance(body.get("text"), str)
    return isinstance(body, dict) and bool(body.get("choices") or body.get("data"))


@cache
def tone(seconds: float = 1.0) -> bytes:
    """A WAV file of a quiet tone: 16 kHz, mono, 16 bits."""
    count = round(seconds * _RATE_HZ)
    samples = (round(1000 * math.sin(2 * math.pi * _TONE_HZ * at / _RATE_HZ)) for at in range(count))
    out = io.BytesIO()
    with wave.open(out, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(_RATE_HZ)
        written.writeframes(struct.pack(f"<{count}h", *samples))
    return out.getvalue()
