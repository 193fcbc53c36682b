"""Hand-written HTTP/2 of an unauthenticated client: preface, frames, headers without compression."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _WINDOW_UPDATE = 0, 1, 4, 8
_END_HEADERS = 4
_PIECE = 16384
"""Largest frame that a peer must take."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """RFC 9113, 4.1."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def header_block(headers: Iterable[tuple[str, str]]) -> bytes:
    """Literal fields, never indexed, no Huffman code (RFC 7541, 6.2.3). Names and values up to 126 bytes."""
    block = b""
    for pair in headers:
        block += b"\x10"
        for text in pair:
            assert len(text) < 127
            block += bytes((len(text),)) + text.encode()
    return block


async def flood(
    port: int, headers: Iterable[tuple[str, str]], body: bytes, tls: ssl.SSLContext | None = None, within_s: float = 3.0
) -> tuple[int, bytes]:
    """Send ``headers``, then ``body`` and further data frames, for ``within_s`` or until the peer closes.

    Returns how many bytes of body could be sent, and the peer's answer.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    sent = 0
    heard = bytearray()

    async def listen() -> None:
        while piece := await reader.read(65536):
            heard.extend(piece)
            granted = len(piece)
            writer.write(frame(_WINDOW_UPDATE, 0, 0, granted.to_bytes(4, "big")))

    listening = asyncio.create_task(listen())
    try:
        async with asyncio.timeout(within_s):
            writer.write(PREFACE + frame(_SETTINGS, 0, 0))
            writer.write(frame(_HEADERS, _END_HEADERS, 1, header_block(headers)))
            piece = body
            while not listening.done():
                writer.write(frame(_DATA, 0, 1, piece))
                await writer.drain()
                sent += len(piece)
                piece = b"x" * _PIECE
                await asyncio.sleep(0)
    except (TimeoutError, OSError):
        pass  # what counts is what arrived
    finally:
        listening.cancel()
        await asyncio.wait({listening})
        writer.close()
    return sent, bytes(heard)
