"""Models that are kept apart: all of their requests go through the ingress, which finds out what killed an engine.

It costs each of them some milliseconds, so that it lasts no longer than the ingress has something to find out.
"""

from __future__ import annotations

from serve.core.change import Change
from serve.core.events import SuspectsKept
from serve.core.fleet import Apart

DOUBT_S = 3.0
"""After a death: who had a request on the engine is at the ingress by then, or was answered by another engine."""

REOPENS_S = 2.0
"""After a death: a request that the edge tries again after its pause of a second finds no engine, and goes to the
ingress. A new one would be its next victim, as the edge cannot be told to prefer the ingress for a second try."""

APART_S = 20.0
"""After the ingress said that it has suspects of the model, or that somebody waits for it."""


def keep_apart(change: Change, model: str, for_s: float, opens: float = 0.0) -> None:
    """For so long the edge hands all requests of ``model`` to the ingress; it knows before the next route opens.

    ``opens``: when that may be.
    """
    found = change.apart.rows.get(model)
    change.slots_changed |= found is None
    until = change.now + for_s
    if found is not None:
        until, opens = max(found.until, until), max(found.opens, opens)
    change.apart.put(model, Apart(change.now if found is None else found.since, until, opens))


def after_death(change: Change, model: str) -> None:
    """One of its engines, perhaps by a request that it had."""
    keep_apart(change, model, DOUBT_S, change.now + REOPENS_S)


def may_open(change: Change, model: str) -> bool:
    """A route to an engine of it."""
    apart = change.apart.rows.get(model)
    return apart is None or change.now >= apart.opens


def suspects_kept(change: Change, event: SuspectsKept) -> None:
    """The ingress has suspects, or remembers a culprit."""
    model = change.names.get(event.model, event.model)
    if model in change.models:
        keep_apart(change, model, APART_S)


def review_apart(change: Change) -> None:
    """(1) somebody waits for the model: what killed the engine may be among them, which is found out once it serves;
    (2) it is over, or the model is gone: the edge alone serves it again."""
    for model, apart in list(change.apart.rows.items()):
        if model in change.queues.rows and model in change.models:  # (1)
            keep_apart(change, model, APART_S)
        elif change.now >= apart.until or model not in change.models:  # (2)
            change.apart.drop(model)
            change.slots_changed = True
