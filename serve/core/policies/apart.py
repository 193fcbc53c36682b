"""Models that are kept apart: all of their requests go through the ingress, which finds out what killed an engine.

It costs each of them some milliseconds, so that it lasts no longer than the ingress has something to find out.
"""

from __future__ import annotations

from serve.core.policy import APART_S
from serve.core.transaction import Transaction
from serve.core.transitions import keep_apart


def review_apart(tx: Transaction) -> None:
    """(1) a request waits for the model: what killed the engine may be among them, which is found out once it serves;
    (2) it is over, or the model is gone: the edge alone serves it again."""
    for model, apart in list(tx.apart.rows.items()):
        if model in tx.queues.rows and model in tx.models:  # (1)
            keep_apart(tx, model, APART_S)
        elif tx.now >= apart.until or model not in tx.models:  # (2)
            tx.apart.drop(model)
            tx.slots_changed = True
