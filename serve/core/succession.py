"""Handing over what a node serves before its block ends: a second engine elsewhere first, then the old one drains."""

from __future__ import annotations

from serve.core.change import Change, live
from serve.core.fleet import EngineState
from serve.core.leaving import matters
from serve.core.routes import retire
from serve.core.waiting import serving


def hand_over(change: Change) -> tuple[str, ...]:
    """Models that need a second engine because the node of theirs ends; the most lately used first.

    Of every engine on a node that is ending or leaves because it ends:
    (1) another engine of its model serves on a node that stays: drain it;
    (2) its model does not matter: it stays until the node leaves, and goes with it;
    (3) another engine of its model loads on a node that stays: wait for that one;
    (4) else its model needs one.
    """
    needed: dict[str, float] = {}
    for node in [node for node in change.nodes.rows.values() if node.ending]:
        for name in node.engines:
            engine = change.engines.rows[name]
            ends = engine.state is EngineState.DRAINING and engine.stop_reason == "node-ends"
            if not live(engine) and not ends:
                continue
            others = [e for e in change.engines_of(engine.model) if live(e) and not change.nodes.rows[e.node].ending]
            if live(engine) and any(serving(other) for other in others):  # (1)
                retire(change, engine, "handed-over")
            elif engine.model in change.models and matters(change, engine):  # (2)
                for other in others:  # (3)
                    if other.state is EngineState.LOADING and not other.takes_over:
                        change.set_engine(other, takes_over=True)
                if not others:  # (4)
                    needed[engine.model] = max(engine.last_used, needed.get(engine.model, 0.0))
    return tuple(sorted(needed, key=lambda model: (-needed[model], model)))
