"""Models that are kept apart: all of their requests go through the ingress, which finds out what killed an engine.

It costs each of them some milliseconds, so that it lasts no longer than the ingress has something to find out.
"""

from __future__ import annotations

from serve.core.change import Change
from serve.core.events import SuspectsKept
from serve.core.fleet import Apart

DOUBT_S = 3.0
"""After a death: who had a request on the engine is at the ingress by then, or was answered by another engine."""

APART_S = 20.0
"""After the ingress said that it has suspects of the model, or that somebody waits for it."""


def keep_apart(change: Change, model: str, for_s: float) -> None:
    """For so long the edge hands all requests of ``model`` to the ingress; it knows before the next route opens."""
    found = change.apart.rows.get(model)
    change.slots_changed |= found is None
    until = change.now + for_s
    change.apart.put(model, Apart(change.now, until) if found is None else Apart(found.since, max(found.until, until)))


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
