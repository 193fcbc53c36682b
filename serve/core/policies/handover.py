"""Hand-over: a replacement engine on another node before a block ends, then the old one drains."""

from __future__ import annotations

from serve.core.engine_use import needed_engines, needs_replacement, staying
from serve.core.looking import not_just_serving
from serve.core.state import EngineState, live, serving, sleeps
from serve.core.table import seen
from serve.core.transaction import Transaction
from serve.core.transitions import begin_stop


def hand_over(tx: Transaction) -> tuple[str, ...]:
    """Models that need another engine because the node of one ends; the most recently used first.

    Of every engine on a node that is ending or leaves because it ends (one that sleeps is stopped: it has nothing to
    hand over, and its model is loaded elsewhere when it is asked for):
    (1) another engine of its model serves on a node that stays, and without it there are as many as its model needs,
        those that still wait for their replacement included: drain it;
    (2) its model is not in use: it stays until the node leaves, and ends with it;
    (3) another engine of its model loads on a node that stays: wait for that one;
    (4) else, if fewer than its model needs are on nodes that stay, it needs one.
    """
    needed: dict[str, float] = {}
    for node in [node for node in seen(tx.nodes.rows, not_just_serving) if node.ending]:
        for name in node.engines:
            engine = tx.engines.rows[name]
            if sleeps(engine):
                begin_stop(tx, engine, "node-ends")
                continue
            ends = engine.state is EngineState.DRAINING and engine.stop_reason == "node-ends"
            if not live(engine) and not ends:
                continue
            others, count = staying(tx, engine.model), needed_engines(tx, engine.model)
            served = sum(serving(other) for other in others)
            waiting = sum(live(e) and tx.ending(e) and e.id != engine.id for e in tx.engines_of(engine.model))
            if live(engine) and served and served + waiting >= count:  # (1)
                begin_stop(tx, engine, "handed-over")
            elif engine.model in tx.models and needs_replacement(tx, engine):  # (2)
                for other in others:  # (3)
                    if other.state is EngineState.LOADING and not other.takes_over:
                        tx.set_engine(other, takes_over=True)
                if len(others) < count:  # (4)
                    needed[engine.model] = max(engine.last_used, needed.get(engine.model, 0.0))
    return tuple(sorted(needed, key=lambda model: (-needed[model], model)))
