"""An engine with uvicorn in front, the HTTP server that vLLM has, and nothing behind: as fast as such an engine can be.

It takes the options of ``tests.support.fake_engine``, checks its key (``VLLM_API_KEY``), parses the body, answers or
streams. A prompt may say ``@tokens=N``.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import uvicorn

from tests.support.fake_engine import Engine, options


class App:
    """Raw ASGI, no framework."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._key = f"Bearer {engine.key}".encode() if engine.key else None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["path"] == "/health":
            await _answer(send, 200, b"{}")
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if self._key is not None and dict(scope["headers"]).get(b"authorization") != self._key:
            await _answer(send, 401, b"{}")
            return
        asked = json.loads(body)
        if asked.get("stream"):
            await self._stream(send, asked)
            return
        words = [f" w{i}" for i in range(self._engine.given.tokens)]
        choice = {"index": 0, "message": {"role": "assistant", "content": "".join(words)}, "finish_reason": "stop"}
        answer = {"id": "fake", "object": "chat.completion", "model": asked["model"], "choices": [choice]}
        await _answer(send, 200, json.dumps(answer).encode())

    async def _stream(self, send: Any, asked: dict[str, Any]) -> None:
        count = int(asked["messages"][0]["content"].rpartition("@tokens=")[2] or self._engine.given.tokens)
        rate = self._engine.given.token_rate
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        begun = time.monotonic()
        for index in range(count):
            if rate and (due := begun + index / rate - time.monotonic()) > 0:
                await asyncio.sleep(due)
            choice = {"index": 0, "delta": {"role": "assistant", "content": f" w{index}"}, "finish_reason": None}
            event = {"id": "fake", "object": "chat.completion.chunk", "model": asked["model"], "choices": [choice]}
            piece = b"data: " + json.dumps(event).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _answer(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    """The program; takes the fake engine's options."""
    given = options()
    if given.uds:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(given.uds)
    else:
        # The protocol is named, because asyncio switches Nagle's algorithm off only where it is.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((given.host, given.port))
    listener.listen(2048)
    config = uvicorn.Config(
        App(Engine(given, 0.0)),
        log_level="error",
        lifespan="off",
        timeout_keep_alive=60,
        ssl_keyfile=given.ssl_keyfile,
        ssl_certfile=given.ssl_certfile,
        ssl_ca_certs=given.ssl_ca_certs,
        ssl_cert_reqs=given.ssl_cert_reqs,
    )
    print(f"listening {given.uds}" if given.uds else "listening {}:{}".format(*listener.getsockname()), flush=True)
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    main()
