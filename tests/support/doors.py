"""The answer of a port to a client without credentials, and to one with a certificate of Ray's."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterable
from pathlib import Path

import psutil

MUTUAL_TLS = "mutual TLS"
"""Answers only clients with a certificate of Ray's."""
PLAIN_HTTP = "plain HTTP"
"""Answers 401 to clients without a token."""
OPEN = "open"
CLOSED = "closed"
"""Nothing listens there any more."""

_PATHS = ("/", "/metrics", "/api/jobs/", "/api/serve/applications/", "/get_runtime_envs_info")
_ALERT = 0x15
"""The first byte of a TLS server's answer to a client without TLS."""
_SETTINGS = b"\0\0\0\4\0\0\0\0\0"


def doors_of(processes: Iterable[psutil.Process]) -> list[tuple[str, str, int]]:
    """Command line, address and port of everything that listens."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended while we looked
            name = " ".join(process.cmdline()) or process.name()
            for known in process.net_connections("tcp"):
                if known.status == psutil.CONN_LISTEN:
                    found.append((name, known.laddr.ip, known.laddr.port))
    return found


def door_at(bound: str, port: int, node: str, identity: Path) -> str:
    """Which of these is at ``port``. ``node``: an address of this machine; ``identity``: a node's files for TLS."""
    address = node if bound in ("0.0.0.0", "::") else bound
    try:
        answers = [_plain_answer(address, port, path) for path in _PATHS]
    except ConnectionRefusedError:
        return CLOSED
    if all(answer.startswith(b"HTTP/1.1 401 ") for answer in answers):
        return PLAIN_HTTP
    if any(answer and answer[0] != _ALERT for answer in answers):
        return OPEN
    stranger = ssl.create_default_context(cafile=identity / "authority.crt")
    own = ssl.create_default_context(cafile=identity / "authority.crt")
    own.load_cert_chain(identity / "node.crt", identity / "node.key")
    if _greeting(address, port, stranger) == b"" and _greeting(address, port, own)[3:4] == _SETTINGS[3:4]:
        return MUTUAL_TLS
    return OPEN


def _plain_answer(address: str, port: int, path: str) -> bytes:
    with socket.create_connection((address, port), timeout=10) as plain:
        try:
            plain.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            return plain.recv(4096)
        except ConnectionError:
            return b""


def _greeting(address: str, port: int, context: ssl.SSLContext) -> bytes:
    """The first bytes of a server of HTTP/2 behind TLS; none if it hangs up."""
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((address, port), timeout=10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=address) as session:
                session.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS)
                return session.recv(9)
        except (ssl.SSLError, ConnectionError):
            return b""
