"""Free ports for servers of the tests."""

from __future__ import annotations

import os
import random
import socket

FIRST, EACH = 20_000, 6_000
"""For two workers below the range that the kernel gives to clients, and outside Ray's own: free while a server is down,
too."""

_given: set[int] = set()
"""By this process: two that are asked for at once differ, though nothing listens on the first yet."""


def free_port() -> int:
    """A port that nothing listens on, of this pytest worker's own range: another worker never takes it first."""
    first = FIRST + EACH * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 2)
    for _ in range(200):
        port = random.randrange(first, first + EACH)
        if port in _given and len(_given) < EACH // 2:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            _given.add(port)
            return port
    raise RuntimeError(f"no free port between {first} and {first + EACH}")


def free_ports(count: int) -> list[int]:
    """``count`` different free ports."""
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port())
    return list(found)
