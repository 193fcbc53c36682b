"""What requesters do, as far as their requests come to the controller: which model each asks after which, and who asked
a model last. Pure, of a fixed size.

A request for a model that serves goes past the controller, so most of a caller's requests are not seen here; those that
wait are, and these are the ones that switching is about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from serve.core.events import Requester

CALLERS_MAX = 256
"""Requesters that are remembered; the one whose last request is the oldest is forgotten first."""
_ASKERS_MAX = 8
"""A model that more asked last is asked by many: nothing is concluded from who they were."""
_NEXT_MAX = 6
_KEPT = 0.9
"""Each request after a model makes the earlier ones count a tenth less: the last ten or so matter."""
_TURN_S = 600.0
"""A request that comes later is not of the same workflow."""
_CROWD_S = 3600.0
ARRIVED_S = 3.5
"""A released request has begun at the edge by then, whose times are whole seconds."""


@dataclass(frozen=True)
class Caller:
    """One requester."""

    model: str
    """Of its last request that came to the controller."""
    at: float
    ticket: str
    crowd_until: float = 0.0
    """It waited for two answers at a time: it is several, and what one of them waits for says nothing of the others."""


@dataclass(frozen=True)
class Asked:
    """The requesters of a model's latest requests, if all of them are known."""

    by: tuple[str, ...]
    at: float
    """When these requests were released."""
    many: int
    """Their number."""


Next = tuple[tuple[str, float], ...]
"""The models that were asked after one by the same requester, and how often, older ones counting less."""


def tag(requester: Requester) -> str:
    """Of a requester; empty for one that is not known."""
    return f"{requester.key} {requester.caller}" if requester.key or requester.caller else ""


def calls(before: Caller | None, model: str, ticket: str, now: float, *, waits: bool) -> Caller:
    """After a request for ``model``. ``waits``: the request before it waits still."""
    crowd_until = now + _CROWD_S if waits else before.crowd_until if before is not None else 0.0
    return Caller(model, now, ticket, crowd_until)


def turn(before: Caller | None, now: float) -> str:
    """The model whose next one in its workflow is asked now; empty: this begins one, or it is several callers."""
    if before is None or now < before.crowd_until or now > before.at + _TURN_S:
        return ""
    return before.model


def after(known: Next, model: str) -> Next:
    """``known`` with one more request for ``model``."""
    counts = {name: _KEPT * count for name, count in known}
    counts[model] = counts.get(model, 0.0) + 1.0
    most = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    return tuple(most[:_NEXT_MAX])


def share(known: Next, model: str) -> float:
    """How often ``model`` was the next one; the fewer are known, the less."""
    total = sum(count for _, count in known)
    return sum(count for name, count in known if name == model) / (total + 1.0)


def asked(by: frozenset[str], many: int, now: float) -> Asked | None:
    """Who asked a model of which ``many`` requests are released now; ``None``: not known, or too many."""
    if "" in by or len(by) > _ASKERS_MAX:
        return None
    return Asked(tuple(sorted(by)), now, many)


def all_wait(one: Asked | None, callers: Mapping[str, Caller], waiting: Mapping[str, int], now: float) -> bool:
    """Whether each requester of a model's latest requests waits for an answer, of another model, and has no more than
    one open at a time. ``waiting``: requester -> its waiters now."""
    if one is None:
        return False
    return all(waiting.get(by, 0) == 1 and by in callers and now >= callers[by].crowd_until for by in one.by)
