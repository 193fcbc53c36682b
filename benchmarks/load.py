"""A closed-loop HTTP load generator: some connections, each sends its next request when it has its answer.

A program of its own (``python -m benchmarks.load``), so that it costs the measured processes nothing but the processor;
uvloop and httptools, so that it is not what is measured. It prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
import sys
import time
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import httptools
import uvloop

_SPREAD_S = 0.4
"""Over which the clients begin."""


@dataclass(frozen=True)
class Result:
    """What one run saw."""

    requests: int
    failed: int
    """Answers with another status than 200, and connections lost."""
    tokens: int
    """Server-sent events with data."""
    seconds: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    first_token_p50_ms: float


@dataclass
class _Run:
    request: bytes
    until: float
    took: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: int = 0
    failed: int = 0


class _Connection(asyncio.Protocol):
    def __init__(self, run: _Run, done: asyncio.Future[None]) -> None:
        self._run, self._done = run, done
        self._sent = 0.0
        self._first = True
        self._answers = 0
        self._transport: Any = None
        self._parser: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._first = True
        self._sent = time.perf_counter()
        self._transport.write(self._run.request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        events = body.count(b"data: ")
        if events and self._first:
            self._first = False
            if self._answers:  # the first one pays for connections; direct, that was paid before the clock ran
                self._run.first.append(time.perf_counter() - self._sent)
        self._run.tokens += events

    def on_message_complete(self) -> None:
        now = time.perf_counter()
        self._answers += 1
        self._run.took.append(now - self._sent)
        if self._parser.get_status_code() != 200:
            self._run.failed += 1
        if now < self._run.until:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if time.perf_counter() < self._run.until:
            self._run.failed += 1
        if not self._done.done():
            self._done.set_result(None)


async def load(
    host: str, port: int, request: bytes, clients: int, seconds: float, tls: ssl.SSLContext | None
) -> Result:
    """``clients`` connections for ``seconds``, begun one after the other; what is in flight at the end is finished."""
    loop = asyncio.get_running_loop()
    begun = time.perf_counter()
    run = _Run(request, begun + seconds)
    ends: list[asyncio.Future[None]] = []
    for number in range(clients):
        # Streams of one length that began together would begin together for ever.
        await asyncio.sleep(max(0.0, begun + _SPREAD_S * number / clients - time.perf_counter()))
        end: asyncio.Future[None] = loop.create_future()
        ends.append(end)
        name = "engine.gateway" if tls is not None else None
        await loop.create_connection(lambda end=end: _Connection(run, end), host, port, ssl=tls, server_hostname=name)
    await asyncio.gather(*ends)
    took = sorted(run.took)
    return Result(
        requests=len(took),
        failed=run.failed,
        tokens=run.tokens,
        seconds=time.perf_counter() - begun,
        p50_ms=1000 * median(took),
        p95_ms=1000 * took[min(len(took) - 1, int(len(took) * 0.95))],
        p99_ms=1000 * took[min(len(took) - 1, int(len(took) * 0.99))],
        first_token_p50_ms=1000 * median(run.first) if run.first else 0.0,
    )


def main() -> None:
    """The program; the request's header lines and body come as JSON on standard input, so that no key is in argv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--ca", help="trust this authority: TLS")
    parser.add_argument("--identity", help="client certificate and key")
    given = parser.parse_args()
    asked = json.load(sys.stdin)
    body = json.dumps(asked["body"]).encode()
    lines = [f"POST {asked['path']} HTTP/1.1", f"content-length: {len(body)}", "content-type: application/json"]
    lines += [f"{name}: {value}" for name, value in asked["headers"].items()]
    request = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    tls = None
    if given.ca:
        tls = ssl.create_default_context(cafile=given.ca)
        tls.load_cert_chain(given.identity)
    result = uvloop.run(load(given.host, given.port, request, given.clients, given.seconds, tls))
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
