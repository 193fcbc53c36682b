"""Waiting for a model to be loaded, look by look."""

from __future__ import annotations

import time
from collections.abc import Callable

from gateway_plugin.answers import FAILED, ModelInfo
from gateway_plugin.errors import ModelUnavailable, WaitDeadline

_FAILED_GRACE_S = 10.0


def wait_until_ready(
    look: Callable[[str], ModelInfo], touch: Callable[[ModelInfo], None], name: str, timeout_s: float, poll_s: float
) -> ModelInfo:
    """What ``GlobusClient.wait_until_ready`` says. ``look`` tells the model's state, ``touch`` has it loaded."""
    deadline = time.monotonic() + timeout_s
    failed_since: float | None = None
    while not (found := look(name)).ready:
        now = time.monotonic()
        failed_since = (failed_since or now) if found.state == FAILED else None
        if failed_since is not None and now - failed_since >= _FAILED_GRACE_S:
            raise ModelUnavailable(
                f"The model '{found.name}' fails to load: {found.reason or 'no reason is known'}", state=FAILED
            )
        if now >= deadline:
            raise WaitDeadline(
                f"The model '{found.name}' is {found.state} and was not ready within {timeout_s:.0f} s.",
                state=found.state,
                eta_s=found.eta_s,
            )
        if found.state in ("cold", FAILED):
            touch(found)
        # every look is a task: the rate limit is for prompts
        time.sleep(min(max(poll_s, (found.eta_s or 0.0) / 2), 15.0, max(0.0, deadline - now)))
    return found
