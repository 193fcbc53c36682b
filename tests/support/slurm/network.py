"""One network namespace a node, all on one bridge with this machine. Needs root and iproute2."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Literal

from tests.support.slurm.configuration import Places


def ip(*arguments: str) -> str:
    """The output of ``ip``. Raises ``CalledProcessError``."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def free_network() -> str:
    """The first three numbers of a network that no interface of this machine is in."""
    taken = ip("-4", "-o", "addr")
    free = [f"10.77.{third}" for third in range(1, 255) if f"10.77.{third}." not in taken]
    return random.choice(free)


def set_up(places: Places, nodes: int) -> None:
    """Bridge and namespaces. ``10.77.X.254`` is this machine, ``10.77.X.K`` node K."""
    ip("link", "add", places.bridge, "type", "bridge")
    ip("addr", "add", f"{places.gateway}/24", "dev", places.bridge)
    ip("link", "set", places.bridge, "up")
    for number in range(1, nodes + 1):
        space, link = places.namespace(number), places.link(number)
        ip("netns", "add", space)
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", link, "master", places.bridge, "up")
        ip("-n", space, "addr", "add", f"{places.network}.{number}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
        ip("-n", space, "link", "set", "lo", "up")
        ip("-n", space, "route", "add", "default", "via", places.gateway)


def inside(places: Places, number: int, *argv: str) -> tuple[str, ...]:
    """``argv`` on node ``number``. Not ``ip netns exec``: that mounts another /sys, and slurmd dies of it."""
    name = f'hostname n{number}; exec "$@"'
    return ("nsenter", f"--net=/run/netns/{places.namespace(number)}", "unshare", "--uts", "sh", "-c", name, "-", *argv)


def plug(places: Places, number: int, state: Literal["up", "down"]) -> None:
    """Connect a node to the others, or cut it off: nothing that it sends arrives then, not even an end."""
    ip("link", "set", places.link(number), state)


def kill_all(places: Places, number: int) -> None:
    """``kill -9`` to everything in a node's namespace."""
    for pid in ip("netns", "pids", places.namespace(number)).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def take_down(places: Places, nodes: int) -> None:
    """Kill what still runs in the namespaces, and remove them and the bridge. Nothing happens without them."""
    for number in range(1, nodes + 1):
        space = places.namespace(number)
        if not Path("/run/netns", space).exists():
            continue
        kill_all(places, number)
        ip("netns", "del", space)
    if Path("/sys/class/net", places.bridge).exists():
        ip("link", "del", places.bridge)
