"""Sets which keys the running edge admits, and cuts the requests in flight of other keys, over its socket.

For each admitted request the edge keeps an entry in the table ``held`` (``frontends.py``), under the digest of its key
and the request's number. The session list has the same number, and the pointer that ``shutdown session`` takes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from gateway_plugin.edge.socket_protocol import map_changes, parse_map, refused
from gateway_plugin.errors import EdgeError

Say = Callable[[str], str]
"""Sends one command to the edge and returns the answer. Raises ``EdgeError`` if there is none."""

_BATCH = 200
"""Changes per line: HAProxy takes 64 KiB."""
_PAUSE_S = 0.02
_SHOW_HELD = "show table held data.conn_cur gt 0"
_HELD = re.compile(r"\bkey=([0-9A-F]{64})/(\d+) ")
_SESSION = re.compile(r"^(0x[0-9a-f]+): \[[^]]*\] id=(\d+) ", re.MULTILINE)


class StillHeld(EdgeError):
    """The edge admits the right keys, but requests of other keys are in flight, or may be."""


def admit_only(say: Say, keys_map: Path, want: Mapping[str, str], revoked: Collection[str], within_s: float) -> None:
    """Make the running edge admit the keys in ``want`` (digest -> value) and no others; returns when it does.

    Requests of the keys removed by this, and of those in ``revoked``, are cut, streams and waiting requests included.

    Raises:
        EdgeError: the edge did not answer, or refused.
        StillHeld: requests of such keys are in flight after ``within_s``, or their number is not known.
    """
    have = parse_map(say(f"show map {keys_map}"), numbered=True)
    changes = map_changes(keys_map, have, want)
    for first in range(0, len(changes), _BATCH):
        if (reason := refused(say(";".join(changes[first : first + _BATCH])))) is not None:
            raise EdgeError(f"the edge refused a change of its keys: {reason}")
    gone = (set(have) | set(revoked)) - set(want)
    if gone:
        cut(say, gone, within_s)


def cut(say: Say, digests: Collection[str] | None, within_s: float) -> None:
    """Cut the requests of these keys (``None``: of all keys). Raises ``EdgeError``, ``StillHeld``.

    Each pointer is looked up again just before it is used, because HAProxy may reuse it for the next session.
    """
    deadline = time.monotonic() + within_s
    while numbers := held_by(digests, say(_SHOW_HELD)):
        if time.monotonic() >= deadline:
            raise StillHeld(f"{len(numbers)} requests that were to be cut are still in flight at the edge")
        for number, pointer in sessions(say("show sess all")).items():
            if number in numbers and number in sessions(say(f"show sess {pointer}")):
                say(f"shutdown session {pointer}")
        time.sleep(_PAUSE_S)


def held_by(digests: Collection[str] | None, answer: str) -> frozenset[int]:
    """Numbers of the requests in flight of these keys (``None``: of all keys), parsed from the table.

    Raises ``StillHeld`` if ``answer`` is not a table.
    """
    if not answer.startswith("# table: held,"):
        raise StillHeld(
            f"the edge cannot say what is in flight ({answer.strip()[:100] or 'no answer'}); if the gateway was "
            "upgraded while it ran, requests that the key has in flight end with 'gateway down' and 'up'"
        )
    return frozenset(int(number) for digest, number in _HELD.findall(answer) if digests is None or digest in digests)


def sessions(answer: str) -> dict[int, str]:
    """Number -> pointer of each session in the output of ``show sess all``."""
    return {int(number): pointer for pointer, number in _SESSION.findall(answer)}
