"""What nodes say over the network while they are tried. Anybody may call: none can hold up another, or fill memory."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from pydantic import ValidationError

from gateway_plugin.doctor.node_report import REPORT_BYTES, Report

_CALL_S = 60.0
"""How long a call may last: a node looks at its GPUs between its call and its words."""
_CALLS = 256
"""Calls at a time. One more, and the oldest of the caller that has most is ended: who calls often keeps out itself."""


@dataclass
class Heard:
    """What was heard, by nonce, and when."""

    talk: bool
    """Whether anybody listens."""
    expected: set[str] = field(default_factory=set)
    """Nonces of the jobs that were submitted; nothing else is kept."""
    reports: dict[str, Report] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)


@dataclass
class _Call:
    peer: str
    """The caller's address."""
    began: float
    text: bytearray = field(default_factory=bytearray)


def report_in(text: bytes | bytearray, nonces: Collection[str]) -> Report | None:
    """``None`` for what is no report of a job with one of ``nonces``."""
    try:
        report = Report.model_validate_json(bytes(text))
    except ValidationError:
        return None
    return report if report.nonce in nonces else None


@contextlib.contextmanager
def listening(head: str, port: int) -> Iterator[Heard]:
    """Hear reports at the address that blocks will use. Where the gateway runs, its own port is there to be reached."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((head, port))
    except OSError:
        listener.close()
        yield Heard(talk=False)
        return
    listener.listen(64)
    listener.setblocking(False)
    heard, over = Heard(talk=True), threading.Event()
    thread = threading.Thread(target=_hear, args=(listener, heard, over), daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        over.set()
        thread.join()
        listener.close()


def _hear(listener: socket.socket, heard: Heard, over: threading.Event) -> None:
    calls: dict[socket.socket, _Call] = {}  # oldest first
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)

        def end(call: socket.socket) -> None:
            selector.unregister(call)
            call.close()
            del calls[call]

        while not over.is_set():
            for key, _ in selector.select(0.2):
                call = key.fileobj
                assert isinstance(call, socket.socket)
                if call is listener:
                    with contextlib.suppress(OSError):  # it went away meanwhile
                        caller, (peer, _) = listener.accept()
                        caller.setblocking(False)
                        selector.register(caller, selectors.EVENT_READ)
                        calls[caller] = _Call(peer, time.monotonic())
                elif call in calls and _said_all(call, calls[call].text):
                    _keep(calls[call].text, heard)
                    end(call)
            for call in [call for call, known in calls.items() if time.monotonic() - known.began > _CALL_S]:
                end(call)
            while len(calls) > _CALLS:
                ((busiest, _),) = Counter(known.peer for known in calls.values()).most_common(1)
                end(next(call for call, known in calls.items() if known.peer == busiest))
        for call in list(calls):
            end(call)


def _said_all(call: socket.socket, text: bytearray) -> bool:
    """Read what is there. Whether there is nothing more to wait for."""
    try:
        more = call.recv(4096)
    except BlockingIOError:
        return False
    except OSError:
        return True
    text += more
    return not more or text.endswith(b"\n") or len(text) >= REPORT_BYTES


def _keep(text: bytearray, heard: Heard) -> None:
    report = report_in(text, heard.expected)
    if report is not None:
        heard.times.setdefault(report.nonce, time.time())
        heard.reports.setdefault(report.nonce, report)
