"""Commands on the edge's socket, and the parsers of their answers. Pure, except ``ask``.

HAProxy separates commands by ``;`` and arguments by blanks, so every part of a command is checked here:
``add map ... x slot1;set server ...`` would change a server's weight.
"""

from __future__ import annotations

import csv
import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gateway_plugin.catalog import MODEL_NAME
from gateway_plugin.errors import EdgeAway, EdgeError

_PLAIN = re.compile(r"[A-Za-z0-9._:@/+=-]+")
"""Allowed characters of a path, a hash, a key or a map's value."""
UNLIMITED = 1_000_000
"""Limit of the server ``cold`` of a slot: never reached."""
_SERVER = re.compile(r"e(\d+)")
_SLOT = re.compile(r"slot(\d+)")


@dataclass(frozen=True)
class ServerStat:
    """One engine's route as the edge sees it. Servers in ``maint`` are left out of every list."""

    slot: int
    server: int
    address: str
    up: bool
    draining: bool
    in_flight: int
    idle_s: float
    """Seconds since its last session began; -1 if there was none."""
    total: int
    """Requests sent to this server since the edge started, over all engines that it held."""
    bytes_out: int = 0
    """Bytes received from it, updated every 5 s while a stream runs."""
    queued: int = 0
    """Its share of the requests that wait at the edge for the slot's engines; not in ``in_flight``."""
    limit: int = 0
    """Requests that it is sent at a time; 0: no limit."""

    @property
    def takes_requests(self) -> bool:
        """Whether the edge sends it new ones."""
        return self.up and not self.draining


def server_name(slot: int, server: int) -> str:
    """``slot3/e1``."""
    if slot < 0 or server < 0:
        raise EdgeError(f"There is no server {server} in slot {slot}: both count from 0.")
    return f"slot{slot:d}/e{server:d}"


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``10.0.0.1:8000`` or ``[fe80::1]:8000``. Raises ``EdgeError`` for anything but an IP address."""
    host, _, port = address.rpartition(":")
    try:
        ip = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        number = int(port) if port.isascii() and port.isdigit() else 0
    except ValueError:
        raise EdgeError(f"The engine's address {address!r} is not IP:PORT; the edge does not resolve names.") from None
    if not 0 < number < 65536:
        raise EdgeError(f"The engine's address {address!r} has no port between 1 and 65535.")
    return str(ip), number


def limit_commands(slot: int, server: int, limit: int) -> tuple[str, ...]:
    """Send a server so many requests at a time (0: no limit). Those that wait beyond it go on where it rose."""
    if limit < 0:
        raise EdgeError(f"A server's limit is 0 (none) or more, got {limit}.")
    command = f"set maxconn server {server_name(slot, server)}"
    # Without a limit HAProxy takes nothing out of the queue that was there.
    return (f"{command} {limit:d}",) if limit else (f"{command} {UNLIMITED}", f"{command} 0")


def leave_commands(slot: int, server: int, state: str) -> tuple[str, ...]:
    """``drain`` or ``maint``: no new request for a server."""
    return (f"set server {server_name(slot, server)} state {state}", release_command(slot))


def release_command(slot: int) -> str:
    """Let the ingress take what waits in a slot's queue, if no engine is left that would.

    HAProxy looks into the queue when a server gets a place, and ``cold`` never lacks one: setting its limit, to what it
    is, makes it look.
    """
    return f"set maxconn server {server_name(slot, 0).partition('/')[0]}/cold {UNLIMITED}"


def open_commands(slot: int, server: int, address: str, limit: int = 0) -> tuple[str, ...]:
    """Make a server take requests: through ``maint`` and with ``health up``, or it would refuse for half a second.

    The limit comes before the first request; HAProxy's state file does not keep it (``observer.limits`` restores it).
    """
    name = server_name(slot, server)
    host, port = split_address(address)
    return (
        f"set server {name} state maint",
        f"set server {name} addr {host} port {port}",
        *limit_commands(slot, server, limit),
        f"set server {name} health up",
        f"set server {name} state ready",
    )


def map_changes(path: Path, have: Mapping[str, str], want: Mapping[str, str]) -> tuple[str, ...]:
    """The commands that make a running map equal to ``want``: (1) removals, (2) changes, each atomic, (3) additions: an
    existing key would be there twice."""

    def command(verb: str, *words: str) -> str:
        return " ".join((verb, "map", *map(_plain, (str(path), *words))))

    return (
        *(command("del", key) for key in have if key not in want),  # (1)
        *(command("set", key, want[key]) for key in want if key in have and have[key] != want[key]),  # (2)
        *(command("add", key, want[key]) for key in want if key not in have),  # (3)
    )


def model_name(name: str) -> str:
    """``name`` itself. Raises ``EdgeError`` if it is not a model's name."""
    if not MODEL_NAME.fullmatch(name):
        raise EdgeError(f"{name!r} cannot be a model's name at the edge; it must match {MODEL_NAME.pattern}.")
    return name


def _plain(text: str) -> str:
    if not _PLAIN.fullmatch(text):
        raise EdgeError(f"{text!r} has a character that must not be sent to the edge.")
    return text


def show_servers(slots: Iterable[int] | None) -> str:
    """``show stat`` for some slots (0.2 ms each), or for all of them; servers in ``maint`` left out."""
    if slots is None:
        return "show stat -1 6 -1 no-maint"
    return ";".join(f"show stat slot{slot:d} 6 -1 no-maint" for slot in slots)


def parse_servers(answer: str) -> tuple[ServerStat, ...]:
    """Parse the answer to ``show_servers``. Raises ``EdgeError`` if it is malformed."""
    if not answer.startswith("# pxname,"):
        raise EdgeError(f"The edge did not list its servers: {answer.strip()[:200] or 'no answer'}")
    columns: list[str] = []
    found: list[ServerStat] = []
    queued: dict[int, int] = {}
    for row in csv.reader(answer.splitlines()):
        if not row:
            continue
        if row[0].startswith("# "):
            columns = [row[0][2:], *row[1:]]
            continue
        cell = dict(zip(columns, row, strict=False))
        slot, server = _SLOT.fullmatch(cell["pxname"]), _SERVER.fullmatch(cell["svname"])
        if slot is not None and cell["svname"] == "BACKEND":
            queued[int(slot[1])] = int(cell["qcur"] or 0)
        if slot is None or server is None or cell["status"].startswith("MAINT"):
            continue
        found.append(
            ServerStat(
                slot=int(slot[1]),
                server=int(server[1]),
                address=cell["addr"],
                up=cell["status"].startswith(("UP", "DRAIN")),
                draining=cell["status"].startswith("DRAIN"),
                in_flight=int(cell["scur"] or 0),
                idle_s=float(cell["lastsess"] or -1),
                total=int(cell["stot"] or 0),
                bytes_out=int(cell["bout"] or 0),
                limit=int(cell["slim"] or 0),
            )
        )
    return tuple(shared(found, queued))


def shared(servers: list[ServerStat], queued: Mapping[int, int]) -> list[ServerStat]:
    """Each slot's queue divided among its engines: those that take requests, or all of them if none does."""
    places: dict[int, list[int]] = {}
    for place, stat in enumerate(servers):
        if queued.get(stat.slot):
            places.setdefault(stat.slot, []).append(place)
    found = list(servers)
    for slot, all_places in places.items():
        taking = [place for place in all_places if servers[place].takes_requests] or all_places
        for number, place in enumerate(taking):
            share = queued[slot] // len(taking) + (number < queued[slot] % len(taking))
            found[place] = replace(servers[place], queued=share)
    return found


def parse_map(text: str, *, numbered: bool) -> dict[str, str]:
    """Key and value of each line: of a map file, or (``numbered``) of ``show map``, with numbered lines."""
    entries: dict[str, str] = {}
    for line in text.splitlines():
        words = line.split()
        if numbered and words:
            if not words[0].startswith("0x"):
                raise EdgeError(f"The edge did not list its map: {line[:200]}")
            words = words[1:]
        if len(words) == 2 and not words[0].startswith("#"):
            entries[words[0]] = words[1]
    return entries


def map_text(entries: Mapping[str, str]) -> str:
    """A map file."""
    return "".join(f"{_plain(key)} {_plain(value)}\n" for key, value in sorted(entries.items()))


def kept_state(answer: str) -> str:
    """The part of ``show servers state`` that ``servers.state`` keeps: two head lines, and engines not in ``maint``.

    Raises ``EdgeError`` if the answer is no such list: an empty file would remove the routes of a restarted edge.
    """
    lines = answer.splitlines()
    if len(lines) < 2 or not lines[1].startswith("# be_id"):
        raise EdgeError(f"The edge did not tell its servers' state: {answer.strip()[:200] or 'no answer'}")
    columns = lines[1].removeprefix("# ").split()
    server, admin = columns.index("srv_name"), columns.index("srv_admin_state")
    kept = [
        line
        for line in lines[2:]
        if len(words := line.split()) > admin and _SERVER.fullmatch(words[server]) and not int(words[admin]) & 1
    ]
    return "\n".join([*lines[:2], *kept, ""])


def refused(answer: str) -> str | None:
    """Why the edge refused ``set server`` or a map command; ``None`` if it did it."""
    text = answer.strip()
    said = [
        line for line in text.splitlines() if line and not line.startswith(("IP changed", "port changed", "no need"))
    ]
    return "; ".join(said) or None


def ask(path: Path, command: str, timeout_s: float = 5.0) -> str:
    """One command, or several separated by ``;``, and the answer. Raises ``EdgeAway`` if the edge does not answer."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(timeout_s)
            link.connect(str(path))
            link.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: link.recv(65536), b"")).decode(errors="replace")
    except OSError as error:
        raise EdgeAway(f"The edge does not answer on {path}: {error}. Is the gateway up?") from error
