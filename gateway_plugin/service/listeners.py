"""Listening sockets of this machine: a port that the gateway needs may be in use by another user."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import sys
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import psutil

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTEN = "0A"


@dataclass(frozen=True)
class Listener:
    """A listening socket."""

    uid: int
    """Its owner; the kernel reports it for the sockets of all users."""
    pid: int | None
    """Its process, if visible to this user."""

    def __str__(self) -> str:
        name = f"uid {self.uid}"
        with contextlib.suppress(KeyError):
            name = f"user {pwd.getpwuid(self.uid).pw_name} ({name})"
        return name if self.pid is None else f"pid {self.pid} of {name}"


def listener_on(port: int, host: str) -> Listener | None:
    """The socket on ``port`` that prevents listening on ``host``, an IPv4 address."""
    found: dict[str, int] = {}
    for table in _TABLES:
        with contextlib.suppress(FileNotFoundError):  # no IPv6
            found |= listening(table.read_text(encoding="ascii"), port, host)
    if not found:
        return None
    uid = next(iter(found.values()))
    return Listener(uid, _holder(port, host) if os.getuid() in (uid, 0) else None)


def taken_by_another_user(what: str, port: int, host: str) -> str:
    """The problem, if another user listens on a port of the gateway and blocks ``host``; empty otherwise."""
    holder = listener_on(port, host)
    return "" if holder is None or holder.uid == os.getuid() else f"port {port} ({what}): in use by {holder}"


def listening(table: str, port: int, host: str) -> dict[str, int]:
    """Sockets of ``/proc/net/tcp`` that listen on ``port`` and block ``host``: inode and uid. Pure."""
    found: dict[str, int] = {}
    for line in table.splitlines()[1:]:
        fields = line.split()
        address, _, number = fields[1].rpartition(":")
        if fields[3] == _LISTEN and int(number, 16) == port and in_the_way(_address(address), host):
            found[fields[9]] = int(fields[7])
    return found


def in_the_way(other: IPv4Address | IPv6Address, host: str) -> bool:
    """Whether a socket that listens on ``other`` prevents listening on ``host``, at the same port. Pure.

    One on ``::`` takes IPv4 too, unless configured otherwise, which cannot be seen. One on a different address does not
    block: it may stay there for good, and is not the holder of the gateway's port.
    """
    own = ip_address(host)
    if isinstance(other, IPv6Address) and other.ipv4_mapped is not None:
        other = other.ipv4_mapped
    if other.is_unspecified or other == own:
        return other.version >= own.version
    return own.is_unspecified and own.version >= other.version


def _address(digits: str) -> IPv4Address | IPv6Address:
    """The kernel writes each four bytes as one number in the machine's byte order."""
    raw = bytes.fromhex(digits)
    words = [int.from_bytes(raw[at : at + 4], "big").to_bytes(4, sys.byteorder) for at in range(0, len(raw), 4)]
    return ip_address(b"".join(words))


def _holder(port: int, host: str) -> int | None:
    """PIDs that are not visible to this user are left out."""
    seen = (one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN)
    at_port = ((one.pid, one.laddr.ip) for one in seen if one.laddr and one.laddr.port == port)
    return next((pid for pid, address in at_port if pid and in_the_way(ip_address(address), host)), None)


def bind_problem(host: str, port: int) -> str | None:
    """Why ``host:port`` cannot be listened on now, and the holder; ``None`` if it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno != 98:
                return f"cannot listen on {host}: {error.strerror}"
            address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])  # of a name, as it is now
            holder = listener_on(port, address)
            return "in use" if holder is None else f"in use by {holder}"
    return None
