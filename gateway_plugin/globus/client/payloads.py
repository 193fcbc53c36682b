"""Prompts as bodies in OpenAI's form, and what a caller wants of the answers. Pure."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from gateway_plugin.api_types import chat_words
from gateway_plugin.errors import InvalidRequest

Prompt = str | Sequence[Mapping[str, Any]]
"""A user's words, or messages in OpenAI's form."""

CHAT, COMPLETIONS, EMBEDDINGS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models"

NO_STREAMING = (
    "There is no streaming through Globus Compute: a task has one result. Two ways: (1) the HTTP API through a tunnel "
    "('ssh -N -L 8180:127.0.0.1:8180 GATEWAY-HOST' to the gateway's own machine, then "
    "gateway_plugin.Client('https://127.0.0.1:8180', KEY, ca=FILE).openai); "
    "(2) leave 'stream' out and ask for short answers (max_tokens)."
)


def chat_item(prompt: Prompt, model: str, system: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """One chat completion. Raises ``InvalidRequest`` for ``stream``."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(part) for part in prompt]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    return {"path": CHAT, "body": {"model": model, "messages": messages, **_allowed(options)}}


def completion_item(prompt: str, model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """One completion. Raises ``InvalidRequest`` for ``stream``."""
    return {"path": COMPLETIONS, "body": {"model": model, "prompt": prompt, **_allowed(options)}}


def embed_item(texts: Sequence[str], model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The vectors of some texts, in base64: a quarter of the bytes."""
    body = {"model": model, "input": list(texts), "encoding_format": "base64", **_allowed(options)}
    return {"path": EMBEDDINGS, "body": body}


def _allowed(options: Mapping[str, Any]) -> Mapping[str, Any]:
    if options.get("stream"):
        raise InvalidRequest(NO_STREAMING)
    return {name: value for name, value in options.items() if name != "stream"}


def chat_text(body: Mapping[str, Any]) -> str:
    """The words of the first choice. Raises ``NothingSaid`` where it ended before the first of them."""
    return chat_words(body["choices"][0])


def completion_text(body: Mapping[str, Any]) -> str:
    """The words of the first choice."""
    return body["choices"][0]["text"] or ""


def vectors(body: Mapping[str, Any]) -> list[list[float]]:
    """One vector a text, in order; an engine that knows no base64 gives numbers."""
    entries = sorted(body["data"], key=lambda entry: entry["index"])
    return [_vector(entry["embedding"]) for entry in entries]


def _vector(given: str | list[float]) -> list[float]:
    if not isinstance(given, str):
        return [float(number) for number in given]
    data = base64.b64decode(given, validate=True)
    if len(data) % 4:
        raise ValueError(f"a vector of {len(data)} bytes")
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def whole(body: dict[str, Any]) -> dict[str, Any]:
    """The answer as it came."""
    return body


def reading(body: dict[str, Any]) -> Any:
    """What the verb would have given that asked for this: text, vectors, or else the answer as it came."""
    kind = body.get("object")
    if kind == "chat.completion":
        return chat_text(body)
    if kind == "text_completion":
        return completion_text(body)
    if kind == "list" and any("embedding" in entry for entry in body.get("data", ())):
        return vectors(body)
    return body
