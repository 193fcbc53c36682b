"""A server on a Unix socket in place of the edge's inner door: gives scripted answers, keeps the requests."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

OK = b'{"ok": true}'


def answer(status: int, body: bytes = OK, *headers: str) -> bytes:
    """A whole HTTP response."""
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", "content-type: application/json", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


NOT_ROUTED = answer(503, b'{"error": {"code": "not_routed"}}', "x-gateway-not-routed: 1")

CUT = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n6\r\ndata: \r\n"
"""The beginning of a stream whose engine dies: no terminating chunk."""


@dataclass
class InnerDoor:
    """``answers`` in order, the last one again and again; ``requests`` are kept raw."""

    path: Path
    answers: list[bytes]
    requests: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0
        )
        self.requests.append(head + await reader.readexactly(length))
        writer.write(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])
        await writer.drain()
        writer.close()


@asynccontextmanager
async def inner_door(*answers: bytes) -> AsyncIterator[InnerDoor]:
    """Open one in a short folder of its own."""
    with tempfile.TemporaryDirectory(prefix="gwd-", dir="/tmp") as folder:
        door = InnerDoor(Path(folder) / "inner.sock", list(answers) or [answer(200)])
        server = await asyncio.start_unix_server(door.serve, path=str(door.path))
        async with server:
            yield door
