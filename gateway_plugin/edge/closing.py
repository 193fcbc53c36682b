"""The front door during shutdown: closed to new requests, while those in flight are counted. By its socket.

The table ``gate`` (``frontends.py``) has one entry while the door is closed; an edge that starts has none.
"""

from __future__ import annotations

import re

from gateway_plugin.edge.admission import Say
from gateway_plugin.edge.socket_protocol import refused
from gateway_plugin.errors import EdgeError

_SHOW_IN_FLIGHT = "show table limits data.conn_cur gt 0"
_IN_FLIGHT = re.compile(r"\bconn_cur=(\d+)")


def shut(say: Say) -> None:
    """Refuse every new request except administration's. Raises ``EdgeError``."""
    _demand(say("set table gate key down data.gpc0 1"))


def open_again(say: Say) -> None:
    """Undo ``shut``. Raises ``EdgeError``."""
    _demand(say("clear table gate key down"))


def in_flight(say: Say) -> int:
    """Number of admitted requests that have not ended, including those waiting for a model. Raises ``EdgeError``."""
    answer = say(_SHOW_IN_FLIGHT)
    if not answer.startswith("# table: limits,"):
        raise EdgeError(f"the edge cannot say what is in flight: {answer.strip()[:100] or 'no answer'}")
    return sum(int(count) for count in _IN_FLIGHT.findall(answer))


def _demand(answer: str) -> None:
    if (reason := refused(answer)) is not None:
        raise EdgeError(f"the edge cannot shut or open its front door: {reason}")
