"""How many engines a model should have."""

from __future__ import annotations

from serve.core.transaction import Transaction


def wanted_replicas(tx: Transaction, model: str) -> int:
    """1 while there is demand for ``model``: waiters, a pin, a request to load it; else 0."""
    return int(tx.wanted(model) or tx.unattended(model))
