"""Many callers at a time over TLS, each on a connection of its own, in one process that does little else.

A program (``python -m benchmarks.crowd``): one JSON order on standard input, one JSON list on standard output, a row a
caller. Sockets and epoll without asyncio: its TLS keeps a quarter of a MiB for each connection. Times are seconds of
``CLOCK_MONOTONIC``, which all processes of a machine share.
"""

from __future__ import annotations

import json
import os
import select
import socket
import ssl
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

_READ = 65536
_TURN_S = 0.05
_SPENT = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


@dataclass(frozen=True)
class Order:
    """What the callers do.

    Caller ``n`` is due at ``start_at + ramp_s * n / count``. ``ask``: it sends one of ``requests`` with one of ``keys``
    (both in turn; ``KEY`` in the text stands for it) and reads the answer. ``idle``: it shakes hands, sends nothing,
    and comes again when it is closed, until ``end_at``. ``mute``: the same without a handshake.
    """

    host: str
    port: int
    count: int
    kind: str
    start_at: float
    ramp_s: float
    end_at: float
    requests: tuple[str, ...] = ("",)
    keys: tuple[str, ...] = ()
    nice: int = 0
    """Of the process: callers elsewhere would not compete with the gateway for its processors."""


@dataclass
class Row:
    """What became of one caller. Times of what did not happen are 0."""

    due: float
    began: float = 0.0
    connected: float = 0.0
    shaken: float = 0.0
    """TLS is agreed, the request sent."""
    first: float = 0.0
    """First byte of the answer."""
    ended: float = 0.0
    status: int = 0
    opened: int = 0
    retry_after: bool = False
    json: bool = False
    whole: bool = False
    """The answer ended as its head said it would."""
    tail: str = ""
    error: str = ""


@dataclass(eq=False)
class Caller:
    """One caller and its connection."""

    row: Row
    request: bytes
    socket: Any = None
    step: str = "connect"
    answer: bytearray = field(default_factory=bytearray)


class Crowd:
    """All callers of one order."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Of the load alone: what checks certificates is tested elsewhere, and the generator shall not be what is slow.
        self.context.check_hostname = False
        self.context.verify_mode = ssl.CERT_NONE
        self.poll = select.epoll()
        self.open: dict[int, Caller] = {}
        self.slowest_turn_s = 0.0

    def run(self) -> list[Row]:
        """Until every caller has its answer, or ``end_at``."""
        order = self.order
        rows = [Row(order.start_at + order.ramp_s * n / order.count) for n in range(order.count)]
        waiting = deque(Caller(row, self._text(n)) for n, row in enumerate(rows))
        while (waiting or self.open) and (now := time.monotonic()) < order.end_at:
            while waiting and waiting[0].row.due <= now and time.monotonic() < now + _TURN_S:
                self._begin(waiting.popleft())
            pause = _TURN_S if not waiting else max(0.0, min(_TURN_S, waiting[0].row.due - time.monotonic()))
            events = self.poll.poll(pause, 512)
            turn = time.monotonic()
            for number, _ in events:
                if (caller := self.open.get(number)) is not None:
                    self._go_on(caller)
            self.slowest_turn_s = max(self.slowest_turn_s, time.monotonic() - turn)
        for caller in list(self.open.values()):
            self._close(caller, "no end" if order.kind == "ask" else "")
        return rows

    def _text(self, number: int) -> bytes:
        keys, requests = self.order.keys, self.order.requests
        return requests[number % len(requests)].replace("KEY", keys[number % len(keys)] if keys else "").encode()

    def _begin(self, caller: Caller) -> None:
        caller.row.began = caller.row.began or time.monotonic()
        caller.row.opened += 1
        caller.step = "connect"
        caller.socket = socket.socket()
        caller.socket.setblocking(False)
        caller.socket.connect_ex((self.order.host, self.order.port))
        self.open[caller.socket.fileno()] = caller
        self.poll.register(caller.socket.fileno(), select.EPOLLOUT)

    def _go_on(self, caller: Caller) -> None:
        try:
            self._step(caller)
        except _SPENT as spent:
            write = isinstance(spent, ssl.SSLWantWriteError)
            self.poll.modify(caller.socket.fileno(), select.EPOLLOUT if write else select.EPOLLIN)
        except OSError as error:
            self._close(caller, type(error).__name__)

    def _step(self, caller: Caller) -> None:
        row = caller.row
        if caller.step == "connect":
            if number := caller.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(number, os.strerror(number))
            row.connected = row.connected or time.monotonic()
            caller.step = "read"
            if self.order.kind != "mute":
                caller.step = "shake"
                before = caller.socket.fileno()
                caller.socket = self.context.wrap_socket(
                    caller.socket, do_handshake_on_connect=False, server_hostname="localhost"
                )
                assert caller.socket.fileno() == before
        if caller.step == "shake":
            caller.socket.do_handshake()
            caller.socket.send(caller.request)  # small: it fits into the socket's buffer
            row.shaken = row.shaken or time.monotonic()
            caller.step = "read"
        while True:
            data = caller.socket.recv(_READ)
            now = time.monotonic()
            row.first = row.first or now
            caller.answer += data
            if not data or _whole(caller.answer):
                break
        self._close(caller, "" if data else "closed")

    def _close(self, caller: Caller, error: str) -> None:
        row = caller.row
        number = caller.socket.fileno()
        self.open.pop(number, None)
        if number >= 0:
            self.poll.unregister(number)
        caller.socket.close()
        row.ended, row.error = time.monotonic(), error
        if self.order.kind != "ask":
            if row.ended < self.order.end_at - _TURN_S:
                self._begin(caller)
            return
        head, _, body = bytes(caller.answer).partition(b"\r\n\r\n")
        row.whole = not error
        row.status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.") else 0
        row.retry_after = b"\r\nretry-after: " in head.lower()
        row.json = b"\r\ncontent-type: application/json" in head.lower() and body.endswith(b"}")
        row.tail = bytes(body[-60:]).decode("latin-1")


def _whole(answer: bytearray) -> bool:
    """Whether an answer with a length, or in chunks, is there to its end."""
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return False
    head = bytes(answer[:end]).lower()
    if b"\r\ntransfer-encoding: chunked" in head:
        return answer.endswith(b"\r\n0\r\n\r\n")
    lengths = [int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(lengths) and len(answer) >= end + 4 + lengths[0]


def main() -> None:
    """The program."""
    given = json.load(sys.stdin)
    order = Order(**given)
    os.nice(order.nice)
    crowd = Crowd(order)
    rows = crowd.run()
    used = time.process_time()
    said = {"rows": [asdict(row) for row in rows], "slowest_turn_s": crowd.slowest_turn_s, "cpu_s": used}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
