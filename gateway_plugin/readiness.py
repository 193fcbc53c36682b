"""Waiting for a model to be loaded, look by look."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from gateway_plugin.api_types import FAILED, ModelInfo
from gateway_plugin.errors import ModelUnavailable, WaitDeadline

_LONGEST_PAUSE_S = 15.0


def wait_until_ready(
    look: Callable[[float], ModelInfo],
    load: Callable[[ModelInfo, float], Future[Any] | None],
    timeout_s: float,
    *,
    poll_s: float,
    look_s: float = 0.0,
    failed_s: float,
    report: Callable[[ModelInfo], None] = lambda found: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> ModelInfo:
    """As ``Client.wait_until_ready``: (1) ready; (2) the request that waits for it ended with an error; (3) fails to
    load, for a while; (4) cold, or nothing was asked for yet: have it loaded; (5) no time for another look; (6) look
    again.

    Args:
        look: the model's state, within so many seconds.
        load: ask for it to be loaded, within so many seconds; returns before it is. A future is a request that waits
            for the model: while it is open the gateway itself says when to give up, and it is cancelled in the end.
        look_s: what a look takes. Where that is much, looks are as far apart as half of what the load still takes.
        report: called with each look that found it not ready.
    """
    deadline = clock() + timeout_s
    failed_since: float | None = None
    waiting: Future[Any] | None = None
    ended: BaseException | None = None
    found, asked = look(timeout_s), False
    try:
        while not found.ready:  # (1)
            now = clock()
            report(found)
            if ended is not None and now < deadline:  # (2)
                raise ended
            # A failure may be an earlier one, and the next try is made after seconds: only one that lasts is an error.
            failed = found.state == FAILED and waiting is None
            failed_since = (failed_since or now) if failed else None
            if failed_since is not None and now - failed_since >= failed_s:  # (3)
                words = f"The model '{found.name}' fails to load: {found.reason or 'no reason is known'}"
                raise ModelUnavailable(words, state=FAILED)
            if (found.state in ("cold", "asleep") or not asked) and waiting is None and now < deadline:  # (4)
                waiting, asked = load(found, deadline - now), True
            left_s = deadline - clock()
            if left_s <= look_s:  # (5)
                words = f"The model '{found.name}' is {found.state} and was not ready within {timeout_s:g} s."
                raise WaitDeadline(words, state=found.state, eta_s=found.eta_s, reason=found.reason)
            pause_s = max(poll_s, (found.eta_s or 0.0) / 2) if look_s else poll_s
            sleep(min(pause_s, _LONGEST_PAUSE_S, left_s - look_s))
            ended = None
            if waiting is not None and waiting.done():  # before the look: the model may have become ready since
                ended, waiting, asked = waiting.exception(), None, False
            found = look(max(look_s, deadline - clock()))  # (6)
    finally:
        if waiting is not None:
            waiting.cancel()
    return found
