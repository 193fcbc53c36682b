"""Fetches of weights: for wanted models whose weights are not on disk, where the gateway may fetch them."""

from __future__ import annotations

from dataclasses import replace

from serve.core.effects import FetchWeights
from serve.core.transaction import Transaction


def review_fetches(tx: Transaction) -> None:
    """Begin a fetch for each model that is asked for; one that has begun goes on without waiters, too."""
    for name, weights in list(tx.weights.rows.items()):
        asked = name in tx.models and (tx.wanted(name) or tx.unattended(name))
        if asked and weights.may_fetch and not weights.fetching:
            tx.weights.put(name, replace(weights, fetching=True, at=tx.now, reason="its weights are being fetched"))
            tx.emit(FetchWeights(tx.models[name]))
