"""Another user's listener on a port that Ray's processes call, which keeps every byte that they send."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

_SETTINGS = b"\0\0\0\4\0\0\0\0\0"
"""An empty SETTINGS frame: a client of HTTP/2 waits for one before it sends its calls."""
_PREFACE = b"PRI * HTTP/2.0"
_HANDSHAKE = 0x16


@dataclass
class Stub:
    """The received data, one entry per connection."""

    raw: list[bytes] = field(default_factory=list)
    """As it was on the wire."""
    read: list[bytes] = field(default_factory=list)
    """The readable part: with TLS only after a handshake that the client finished."""
    trusted: int = 0
    """Handshakes that the client finished."""

    @property
    def spoken_to_in_tls(self) -> int:
        """Connections that began with a handshake."""
        return sum(1 for data in self.raw if data[:1] == bytes([_HANDSHAKE]))

    def everything(self) -> bytes:
        """All bytes, on the wire and after decryption."""
        return b"\n".join((*self.raw, *self.read))


@contextlib.contextmanager
def stub_on(port: int, tls: ssl.SSLContext | None = None) -> Iterator[Stub]:
    """Listen on ``port`` of every address, as a server of HTTP/2; with ``tls`` behind TLS."""
    found = Stub()
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port))
        server.listen(64)
        server.settimeout(0.2)
        stop = threading.Event()
        threads = [threading.Thread(target=_accept, args=(server, stop, tls, found))]
        threads[0].start()
        try:
            yield found
        finally:
            stop.set()
            threads[0].join()


def _accept(server: socket.socket, stop: threading.Event, tls: ssl.SSLContext | None, found: Stub) -> None:
    talks: list[threading.Thread] = []
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            connection, _ = server.accept()
            talks.append(threading.Thread(target=_talk, args=(connection, stop, tls, found)))
            talks[-1].start()
    for talk in talks:
        talk.join()


def _talk(connection: socket.socket, stop: threading.Event, tls: ssl.SSLContext | None, found: Stub) -> None:
    """Everything through memory, so that the wire is seen, too."""
    raw, read = bytearray(), bytearray()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = None if tls is None else tls.wrap_bio(incoming, outgoing, server_side=True)
    greeted = False
    with connection:
        connection.settimeout(0.2)
        until = time.monotonic() + 10
        with contextlib.suppress(OSError):
            while not stop.is_set() and time.monotonic() < until:
                if session is None and not greeted:
                    connection.sendall(_SETTINGS)
                    greeted = True
                try:
                    data = connection.recv(65536)
                except TimeoutError:
                    continue
                if not data:
                    break
                raw += data
                if session is None:
                    read += data
                    continue
                incoming.write(data)
                try:
                    if not greeted:
                        session.do_handshake()
                        session.write(_SETTINGS)
                        greeted = True
                        found.trusted += 1
                    while True:
                        read += session.read(65536)
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLError:  # the client reports why it does not trust this certificate
                    break
                finally:
                    if outgoing.pending:
                        connection.sendall(outgoing.read())
    found.raw.append(bytes(raw))
    found.read.append(bytes(read))


def is_http2(data: bytes) -> bool:
    """Whether a client of HTTP/2 was understood."""
    return data.startswith(_PREFACE)
