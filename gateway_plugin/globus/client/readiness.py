"""Waiting for a model to be loaded, look by look."""

from __future__ import annotations

import time
from collections.abc import Callable

from gateway_plugin.api_types import FAILED, ModelInfo
from gateway_plugin.errors import ModelUnavailable, WaitDeadline

LOOK_S = 180.0
"""The first task of a user starts a process at the endpoint, which takes its time where the file system is slow."""
_QUICK_LOOK_S = 2.0
"""What a look takes once that runs: with less time left there is none."""
_FAILED_GRACE_S = 10.0


def wait_until_ready(
    look: Callable[[float], ModelInfo],
    touch: Callable[[ModelInfo, float], None],
    timeout_s: float,
    poll_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> ModelInfo:
    """What ``GlobusClient.wait_until_ready`` says: (1) ready; (2) fails to load, for a while; (3) cold: have it loaded;
    (4) no time for another look; (5) look again.

    ``look`` tells the model's state and ``touch`` has it loaded, each within so many seconds.
    """
    deadline = clock() + timeout_s
    failed_since: float | None = None
    found = look(min(LOOK_S, timeout_s))
    while not found.ready:  # (1)
        now = clock()
        failed_since = (failed_since or now) if found.state == FAILED else None
        if failed_since is not None and now - failed_since >= _FAILED_GRACE_S:  # (2)
            raise ModelUnavailable(
                f"The model '{found.name}' fails to load: {found.reason or 'no reason is known'}", state=FAILED
            )
        if found.state in ("cold", FAILED) and now < deadline:  # (3)
            touch(found, min(LOOK_S, deadline - now))
        left = deadline - clock()
        if left < _QUICK_LOOK_S:  # (4)
            raise WaitDeadline(
                f"The model '{found.name}' is {found.state} and was not ready within {timeout_s:g} s.",
                state=found.state,
                eta_s=found.eta_s,
            )
        # every look is a task: the rate limit is for prompts
        sleep(min(max(poll_s, (found.eta_s or 0.0) / 2), 15.0, left - _QUICK_LOOK_S))
        found = look(min(LOOK_S, max(_QUICK_LOOK_S, deadline - clock())))  # (5)
    return found
