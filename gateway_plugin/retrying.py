"""Whether a request over HTTP is sent again, and when: ``openai``'s own rules, within the request's time. Pure."""

from __future__ import annotations

from gateway_plugin.errors import GatewayError, GatewayUnreachable

_REPEATS = 2
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0
_LONGEST_HINT_S = 60.0
_TRY_AGAIN = frozenset({408, 409, 429})


def pause_s(error: GatewayError, repeats: int, left_s: float, jitter: float) -> float | None:
    """Seconds until the next try, or ``None``: ``error`` is the answer.

    (1) two repeats; (2) an error that can pass; (3) the gateway's ``Retry-After``, up to a minute, else a pause that
    doubles; (4) within the time that is left: the gateway's own error says more than that the time is up.

    Args:
        repeats: made so far.
        left_s: of the request's time.
        jitter: 0 to 1: how much of a quarter is taken off a pause that the gateway did not ask for.
    """
    if repeats >= _REPEATS:  # (1)
        return None
    if error.headers().get("x-should-retry") == "false" or not (error.status in _TRY_AGAIN or error.status >= 500):
        return None  # (2)
    # The hint of GatewayUnreachable is for people: no gateway said it.
    hint_s = None if isinstance(error, GatewayUnreachable) else error.retry_after_s
    if hint_s is not None and 0 < hint_s <= _LONGEST_HINT_S:  # (3)
        pause = hint_s
    else:
        pause = min(_FIRST_PAUSE_S * 2**repeats, _LONGEST_PAUSE_S) * (1 - jitter / 4)
    return pause if pause < left_s else None  # (4)
