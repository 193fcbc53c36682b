"""Another user of this machine, for tests that run as root: that user's attempts, and their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

UID = 65534
"""The unprivileged system user, which owns no file of the gateway's."""

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")

_BECOME = f"""
import encodings.idna, json, os, select, socket, ssl, sys, time  # the interpreter may lie where that user may not go
os.setgroups([]); os.setgid({UID}); os.setuid({UID})
"""

_SQUAT = """
ports, folder = json.loads(sys.argv[1]), sys.argv[2]
held, open_to = {}, {}
log = open(os.path.join(folder, "log.jsonl"), "a", buffering=1)
def say(**what): log.write(json.dumps(what) + chr(10))
while True:
    for port in ports:
        if port not in held:
            listener = socket.socket(); listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("0.0.0.0", port)); listener.listen(64)
            except OSError:
                listener.close(); continue
            held[port] = listener; say(event="bound", port=port)
    for name in os.listdir(folder):
        if name.startswith("leave-"):
            port = int(name[6:])
            for sock in [s for s, p in open_to.items() if p == port] + ([held.pop(port)] if port in held else []):
                open_to.pop(sock, None); sock.close()
            if port in ports: ports.remove(port); say(event="left", port=port)
    ready, _, _ = select.select([*held.values(), *open_to], [], [], 0.005)
    for sock in ready:
        if sock in open_to:
            port = open_to[sock]
            try: data = sock.recv(65536)
            except OSError: data = b""
            if not data: open_to.pop(sock); sock.close(); continue
            say(event="got", port=port, data=data.decode("latin-1"))
            if not data.startswith(b"\\x16\\x03"):  # not TLS: play along, so that more is said
                greeting = b"\\0\\0\\0\\4\\0\\0\\0\\0\\0" if data.startswith(b"PRI ") else (
                    b"HTTP/1.1 200 OK\\r\\ncontent-type: application/json\\r\\ncontent-length: 2\\r\\n\\r\\n{}")
                try: sock.sendall(greeting)
                except OSError: pass
        else:
            port = next(p for p, s in held.items() if s is sock)
            sock, _ = sock.accept(); open_to[sock] = port; say(event="connected", port=port)
"""


def attempt(program: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Run this Python as the other user."""
    return subprocess.run(
        [sys.executable, "-I", "-c", f"{_BECOME}\n{program}"],
        cwd="/", capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


@dataclass
class Squatter:
    """A process of the other user that takes each of its ports whenever it is free, and keeps all data that it
    receives."""

    folder: Path
    child: subprocess.Popen[bytes]

    def events(self, what: str, port: int | None = None) -> list[dict[str, object]]:
        """``bound``, ``connected``, ``got`` or ``left``, of all ports or of one."""
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        found = [json.loads(line) for line in lines]
        return [e for e in found if e["event"] == what and port in (None, e["port"])]

    def heard(self, port: int | None = None) -> str:
        """Every byte that it received, as Latin-1."""
        return "".join(str(event["data"]) for event in self.events("got", port))

    def leave(self, port: int) -> None:
        """Give the port back, for good."""
        (self.folder / f"leave-{port}").touch()


@contextmanager
def squatting(ports: Sequence[int]) -> Iterator[Squatter]:
    """The other user on these ports of every address."""
    with tempfile.TemporaryDirectory(prefix="gwx-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        os.chown(folder, UID, UID)
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", f"{_BECOME}\n{_SQUAT}", json.dumps(list(ports)), name], cwd="/"
        )
        try:
            yield Squatter(folder, child)
        finally:
            child.kill()
            child.wait()
