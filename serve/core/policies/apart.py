"""Models that are kept apart: all of their requests go through the ingress, which finds the one that kills engines.

It costs each request some milliseconds, so it lasts only while the ingress needs it.
"""

from __future__ import annotations

from serve.core.policy import APART_S
from serve.core.transaction import Transaction
from serve.core.transitions import keep_apart


def review_apart(tx: Transaction) -> None:
    """(1) a request waits for the model: the one that killed the engine may be among them, which is found out once it
    serves; (2) it is over, or the model is gone: the edge alone serves it again."""
    for model, apart in list(tx.apart.rows.items()):
        if model in tx.queues.rows and model in tx.models:  # (1)
            keep_apart(tx, model, APART_S)
        elif tx.now >= apart.until or model not in tx.models:  # (2)
            tx.apart.drop(model)
            tx.slots_changed = True
