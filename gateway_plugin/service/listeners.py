"""Who listens on a port of this machine: a port that the gateway is about to take may be somebody else's."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
from dataclasses import dataclass
from pathlib import Path

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTEN = "0A"


@dataclass(frozen=True)
class Listener:
    """A listening socket."""

    uid: int
    """Whose it is; the kernel tells that of everybody's."""
    pid: int | None
    """Its process, if this user may see it."""

    def __str__(self) -> str:
        name = f"uid {self.uid}"
        with contextlib.suppress(KeyError):
            name = f"user {pwd.getpwuid(self.uid).pw_name} ({name})"
        return name if self.pid is None else f"pid {self.pid} of {name}"


def listener_on(port: int) -> Listener | None:
    """What listens on ``port``, whatever the address."""
    found: dict[str, int] = {}
    for table in _TABLES:
        with contextlib.suppress(FileNotFoundError):  # no IPv6
            found |= listening(table.read_text(encoding="ascii"), port)
    if not found:
        return None
    uid = next(iter(found.values()))
    return Listener(uid, _holder(set(found), uid))


def taken_by_another_user(what: str, port: int) -> str:
    """What is wrong where another user listens on a port of ours; empty otherwise."""
    holder = listener_on(port)
    return "" if holder is None or holder.uid == os.getuid() else f"port {port} ({what}): in use by {holder}"


def listening(table: str, port: int) -> dict[str, int]:
    """Sockets of ``/proc/net/tcp`` that listen on ``port``: inode and uid. Pure."""
    found: dict[str, int] = {}
    for line in table.splitlines()[1:]:
        fields = line.split()
        if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
            found[fields[9]] = int(fields[7])
    return found


def _holder(inodes: set[str], uid: int) -> int | None:
    if os.getuid() not in (uid, 0):
        return None
    links = {f"socket:[{inode}]" for inode in inodes}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if any(os.readlink(link) in links for link in (entry / "fd").iterdir()):
                return int(entry.name)
        except OSError:
            continue  # gone, or another user's
    return None


def bind_problem(host: str, port: int) -> str | None:
    """Why nobody could listen on ``host:port`` now, and who does; ``None`` if one could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno != 98:
                return f"cannot listen on {host}: {error.strerror}"
            holder = listener_on(port)
            return "in use" if holder is None else f"in use by {holder}"
    return None
