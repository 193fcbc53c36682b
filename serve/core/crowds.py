"""A model that sleeps where others are mostly in use loads where they are not: an engine wakes only on the GPUs where
it fell asleep, so that two busy models of one GPU would take turns for ever, each drained for the other. One that
shares its GPUs with many others moves to where there are fewer.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve.core.habits import busy
from serve.core.node_times import takes
from serve.core.plan import Plan, When, turns_with
from serve.core.room import Need, need_of
from serve.core.sleep_room import outlived
from serve.core.state import Engine, EngineState, Node, stays
from serve.core.transaction import Transaction

CROWDED = 0.75
"""Share of the last ten minutes in which those that do not fit beside a model used its GPUs, from which on it moves."""
CALMER = 0.5
"""By so much less they used those to which it moves: a load pays within minutes, and it does not move back."""
FEWER = 2
"""By so much less weigh the turns that it takes where it moves to. Each move makes those of all models less, so moves
come to an end."""
ASKED = 0.02
"""A model that was used less would gain nothing by a load."""


def crowded_out(plan: Plan, name: str, engines: Sequence[Engine]) -> bool:
    """Whether it loads elsewhere: (1) it is asked often enough; (2) all GPUs on which it sleeps are crowded, or many
    take turns there; (3) there is room on calmer ones, or will be, or its waiters weigh more than those that hold it.
    """
    tx = plan.tx
    if busy(tx.habits.rows.get(name), tx.now) < ASKED:  # (1)
        return False
    need = need_of(tx.models[name])
    nodes = [(tx.nodes.rows[one.node], one) for one in engines if one.state is EngineState.ASLEEP]
    homes = [(node, one.parts[0].gpus) for node, one in nodes if stays(node)]
    here = min((crowd(tx, *home, need, name) for home in homes), default=0.0)
    many = min((turns_on(tx, *home, name) for home in homes), default=0)
    if here < CROWDED and many < FEWER:  # (2)
        return False
    where = takes(tx, name, ending=False)
    found = plan.best(name, need, where, When.AT_ONCE) or plan.best(name, need, where, When.ONCE_FREED)
    if found is None and (chosen := plan.cheapest(name, need, where, claimed=False)) is not None:
        price = chosen[1].cost + chosen[1].beside_s
        found = (chosen[0], chosen[1].gpus) if price <= tx.policies.limit(tx, name) else None
    if found is None:
        return False
    calmer = here >= CROWDED and crowd(tx, *found, need, name) <= here - CALMER
    return calmer or turns_on(tx, *found, name) <= many - FEWER  # (3)


def turns_on(tx: Transaction, node: Node, gpus: tuple[int, ...], name: str) -> int:
    """Weight of the turns that ``name`` takes on these GPUs (``serve.core.beside``)."""
    others = (tx.engines.rows[one] for one in node.engines)
    return sum(turns_with(tx, node, one, name) for one in others if not set(gpus).isdisjoint(one.parts[0].gpus))


def crowd(tx: Transaction, node: Node, gpus: tuple[int, ...], need: Need, name: str) -> float:
    """Share of the last ten minutes in which those that do not fit beside ``name`` used the busiest of ``gpus``. One
    that sleeps, while its model serves elsewhere, is not used there."""
    uses = dict.fromkeys(gpus, 0.0)
    for other in (tx.engines.rows[one] for one in node.engines):
        elsewhere = other.state is EngineState.ASLEEP and outlived(tx, other)
        share = 0.0 if other.model == name or elsewhere else busy(tx.habits.rows.get(other.model), tx.now)
        for part in other.on(node.id):
            for gpu in uses.keys() & set(part.gpus):
                uses[gpu] += share if part.mib + need.mib > node.gpu_mib[gpu] else 0.0
    return max(uses.values(), default=0.0)
