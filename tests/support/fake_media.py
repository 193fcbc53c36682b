"""A fake engine's sound and pictures (``--media``): forms with files in, binary answers out.

What it answers tells what arrived: names, sizes and checksums.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from python_multipart import parse_form
from python_multipart.exceptions import FormParserError

from tests.support.raw_http import Exchange

FORMS = ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/images/edits")
JSON = ("/v1/audio/speech", "/v1/images/generations")


@dataclass
class Form:
    """Fields, and files by their field."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


def read_form(exchange: Exchange) -> Form | None:
    """``None``: it is none."""
    found = Form()

    def on_field(got: Any) -> None:
        found.fields[got.field_name.decode()] = (got.value or b"").decode(errors="replace")

    def on_file(got: Any) -> None:
        got.file_object.seek(0)
        found.files[got.field_name.decode()] = got.file_object.read()

    request = exchange.request
    headers = {
        "Content-Type": request.header("content-type").encode(),
        "Content-Length": str(len(request.body)).encode(),
    }
    try:
        parse_form(headers, io.BytesIO(request.body), on_field, on_file)
    except (FormParserError, ValueError):
        return None
    return found


def heard(model: str, form: Form) -> dict[str, Any]:
    """What a transcription says: which file arrived."""
    sound = form.files.get("file", b"")
    return {"text": f"{model} heard {len(sound)} bytes {hashlib.sha256(sound).hexdigest()[:8]}"}


def told(exchange: Exchange, model: str, form: Form) -> Coroutine[Any, Any, None] | None:
    """Answer a form."""
    if "file" not in form.files and "image" not in form.files:
        exchange.send(422, b'{"detail": "no file"}')
        return None
    answer = heard(model, form)
    if form.fields.get("stream") == "true":
        return _stream(exchange, answer["text"])
    if form.fields.get("response_format") == "text":
        exchange.send(200, answer["text"].encode(), "text/plain")
    else:
        exchange.send(200, json.dumps(answer).encode())
    return None


async def _stream(exchange: Exchange, text: str) -> None:
    exchange.start()
    for word in text.split(" "):
        await exchange.chunk(
            b"data: " + json.dumps({"type": "transcript.text.delta", "delta": word}).encode() + b"\n\n"
        )
    await exchange.chunk(b"data: [DONE]\n\n")
    exchange.end()


def made(exchange: Exchange, path: str, body: dict[str, Any]) -> Coroutine[Any, Any, None] | None:
    """Speech, streamed as bytes that are no text; or a picture in JSON."""
    if path == "/v1/images/generations":
        picture = base64.b64encode(str(body.get("prompt", "")).encode()).decode()
        exchange.send(200, json.dumps({"created": 1, "data": [{"b64_json": picture}]}).encode())
        return None
    return _speak(exchange, str(body.get("input", "")))


def sound_of(text: str) -> bytes:
    """What it says for a text."""
    return b"RIFF\x00\xff\xfe" + text.encode() * 1000


async def _speak(exchange: Exchange, text: str) -> None:
    sound = sound_of(text)
    exchange.start(content_type="audio/wav")
    for start in range(0, len(sound), 4096):
        await exchange.chunk(sound[start : start + 4096])
    exchange.end()
