"""Answers to waiters: those whose model serves, and those whose model cannot be served."""

from __future__ import annotations

from serve.core.asking import note_asked
from serve.core.state import serving
from serve.core.supply import why_hopeless
from serve.core.transaction import Transaction
from serve.core.transitions import answer_all, mark_granted


def answer_ready(tx: Transaction) -> None:
    """Release the waiters of every model that serves."""
    for model in sorted(tx.queues.rows):
        if any(serving(engine) for engine in tx.engines_of(model)):
            note_asked(tx, model)
            answer_all(tx, model, None)
            mark_granted(tx, model)


def refuse_hopeless(tx: Transaction, unplaced: tuple[str, ...]) -> None:
    """Refuse waiters for models that no node, present or available soon, could hold."""
    for name in unplaced:
        hopeless = why_hopeless(tx, tx.models[name])
        if hopeless is not None:
            answer_all(tx, name, hopeless)
