"""Reports on weights: a model whose weights are not on disk gets no engine, and no node is asked for it."""

from __future__ import annotations

from serve.core.events import WeightsFetching, WeightsMissing, WeightsThere
from serve.core.state import Weights, live
from serve.core.supply import without_weights
from serve.core.transaction import Transaction
from serve.core.transitions import answer_all


def weights_there(tx: Transaction, event: WeightsThere) -> None:
    """It may be loaded. Failures before that do not count: they came from the weights, as far as is known."""
    if event.model in tx.weights.rows:
        tx.weights.drop(event.model)
        tx.failures.drop(event.model)


def weights_missing(tx: Transaction, event: WeightsMissing) -> None:
    """Its waiters are refused, unless the gateway may fetch them or it has an engine all the same."""
    if event.model not in tx.models:
        return
    weights = Weights(event.reason, event.detail or event.reason, event.may_fetch, tx.now)
    tx.weights.put(event.model, weights)
    if not event.may_fetch and not any(map(live, tx.engines_of(event.model))):
        answer_all(tx, event.model, without_weights(event.model, weights))


def weights_fetching(tx: Transaction, event: WeightsFetching) -> None:
    if event.model in tx.models:
        tx.weights.put(
            event.model,
            Weights(
                "its weights are being fetched", "", True, tx.now, True,
                event.done_bytes, event.total_bytes, event.bytes_s,
            ),
        )  # fmt: skip
