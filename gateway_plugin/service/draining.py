"""Before the gateway ends: no new request, and time for those in flight.

The supervisor drains, so that a drain goes on when the terminal of ``gateway down`` is gone, and nothing is
started again meanwhile; ``down`` itself where no supervisor lives. Two files in the run folder go between them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import httpx

from gateway_plugin.edge import closing
from gateway_plugin.edge.admission import Say, cut
from gateway_plugin.edge.socket_protocol import ask
from gateway_plugin.errors import EdgeError
from gateway_plugin.paths import Layout
from gateway_plugin.processes import Mark, alive
from gateway_plugin.service.discovery import edges_of
from gateway_plugin.service.supervisor_state import read_status
from gateway_plugin.state_file import LenientState, StateFile, StateT

log = logging.getLogger("gateway.drain")

GRACE_S = 30.0
"""What ``down`` gives requests in flight."""
SIGNALLED_GRACE_S = 5.0
"""The same where the supervisor was signalled by another program: a machine that shuts down kills after seconds."""
_POLL_S = 0.2
_TOLD_EVERY_S = 1.0
_TELL_S = 2.0
_CUT_S = 5.0
_SLOW_S = 15.0
"""How long a supervisor may take before it drains: it may be in the middle of starting a part."""


class Drain(LenientState):
    """How far it is."""

    in_flight: int = 0
    left_s: float = 0.0
    first: int = 0
    """Requests in flight when it began."""
    cut: int = 0
    """Requests that were still in flight at the end, and broken off."""
    seconds: float = 0.0
    done: bool = False


class DrainRequest(LenientState):
    """What ``down`` asks of the supervisor."""

    grace_s: float = SIGNALLED_GRACE_S


Tell = Callable[[Drain], None]


def drain(layout: Layout, grace_s: float, hurry: threading.Event, tell: Tell = lambda drain: None) -> Drain:
    """Shut the front door, and wait until nothing is in flight, ``grace_s`` are over, or ``hurry`` is set.

    Requests that wait for a model are answered at once. What is left at the end is cut. With a grace of 0, or without
    an edge that answers, nothing is done.
    """
    began = time.monotonic()
    say: Say = partial(ask, layout.edge_socket)
    found = Drain()
    if grace_s > 0 and edges_of(layout):
        try:
            found = _drained(layout, say, grace_s, hurry, tell, began)
        except EdgeError as error:
            log.warning("drain broken off: %s", error.message)
    seconds = round(time.monotonic() - began, 2)
    found = Drain(first=found.first, cut=found.in_flight, seconds=seconds, done=True)
    log.info("drained first=%d cut=%d seconds=%.1f", found.first, found.cut, found.seconds)
    tell(found)
    return found


def _drained(layout: Layout, say: Say, grace_s: float, hurry: threading.Event, tell: Tell, began: float) -> Drain:
    try:
        closing.shut(say)
    except EdgeError as error:  # of an earlier version: it has no such gate
        log.warning("new requests are not refused: %s", error.message)
    first: int | None = None
    told_at = -_TOLD_EVERY_S
    while True:
        count = closing.in_flight(say)
        first = count if first is None else first
        elapsed_s = time.monotonic() - began
        found = Drain(in_flight=count, left_s=round(max(0.0, grace_s - elapsed_s), 1), first=first)
        tell(found)
        if not count:
            return found
        if not found.left_s or hurry.is_set():
            cut(say, None, _CUT_S)
            return found
        if elapsed_s - told_at >= _TOLD_EVERY_S:  # again: one whose engine died meanwhile waits anew
            told_at = elapsed_s
            _tell_waiters(layout)
        hurry.wait(min(_POLL_S, found.left_s))


def _tell_waiters(layout: Layout) -> None:
    """Have the controller answer every request that waits for a model; where it is away they wait on."""
    try:
        headers = {"authorization": f"Bearer {layout.admin_key.read_text(encoding='utf-8').strip()}"}
        transport = httpx.HTTPTransport(uds=str(layout.owner_door))
        with httpx.Client(transport=transport, timeout=_TELL_S, trust_env=False, headers=headers) as client:
            client.post("http://localhost/gateway/v1/close").raise_for_status()
    except (OSError, ValueError, httpx.HTTPError) as error:  # a garbled key is no header
        log.warning("requests that wait for models are not answered: %s: %s", type(error).__name__, error)


def drain_as_asked(layout: Layout, hurry: threading.Event) -> Drain:
    """The supervisor's: as ``down`` asked for, which sees how far it is; else ``SIGNALLED_GRACE_S``."""

    def tell(found: Drain) -> None:
        _write(_progress(layout), found)

    asked = _request(layout).read_or_none() or DrainRequest()
    return drain(layout, asked.grace_s, hurry, tell)


def forget_requests(layout: Layout) -> None:
    """What was asked of an earlier supervisor does not concern this one; a door that was shut is opened again."""
    _request(layout).path.unlink(missing_ok=True)
    _progress(layout).path.unlink(missing_ok=True)
    if edges_of(layout):
        try:
            closing.open_again(partial(ask, layout.edge_socket))
        except EdgeError as error:
            log.warning("front door not opened again: %s", error.message)


def let_finish(
    layout: Layout, supervisors: Sequence[Mark], grace_s: float, hurry: threading.Event, tell: Tell
) -> Drain:
    """``down``'s: have the supervisor drain and end all, and watch it drain; without one, drain.

    Returns when nothing is in flight any more. ``hurry``: the user will not wait. Where the grace cannot be passed to
    the supervisor, ``down`` drains all the same, and has the supervisor end the rest.
    """
    began = time.monotonic()
    if any(alive(known) for known in supervisors):
        told = _write(_request(layout), DrainRequest(grace_s=grace_s))
        if not told and grace_s > 0 and not _stopping(layout):
            found = drain(layout, grace_s, hurry, tell)
            _signal(supervisors)
            return found
        if not _stopping(layout) or grace_s <= 0:  # one that drains already takes a second signal for haste
            _signal(supervisors)
    found = Drain()
    hurried = False
    while any(alive(known) for known in supervisors) and time.monotonic() - began < grace_s + _SLOW_S:
        seen = read_drain(layout)
        if seen is not None:
            found = seen
            tell(found)
        if found.done:
            return found
        if hurry.is_set() and not hurried:
            hurried = True
            _signal(supervisors)
        time.sleep(_POLL_S)
    if any(alive(known) for known in supervisors):
        return found
    return drain(layout, max(0.0, grace_s - (time.monotonic() - began)), hurry, tell)


def read_drain(layout: Layout) -> Drain | None:
    """How far the supervisor's drain is; ``None`` if there is none."""
    return _progress(layout).read_or_none()


def _stopping(layout: Layout) -> bool:
    return read_status(layout).stage == "stopping"


def _signal(supervisors: Sequence[Mark]) -> None:
    for known in supervisors:
        with contextlib.suppress(ProcessLookupError):  # it ended between the two looks
            os.kill(known.pid, signal.SIGTERM)


def _request(layout: Layout) -> StateFile[DrainRequest]:
    return StateFile(layout.drain_request, DrainRequest)


def _progress(layout: Layout) -> StateFile[Drain]:
    return StateFile(layout.drain_progress, Drain)


def _write(file: StateFile[StateT], state: StateT) -> bool:
    """Whether it is written. On a full disk it is not, and the gateway ends all the same."""
    try:
        file.write(state)
    except OSError as error:
        log.warning("%s cannot be written: %s", file.path, error)
        return False
    return True
