"""What a waiting model weighs against what holds the room that it needs, in sentences. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from serve.core.node_times import takes
from serve.core.plan import Plan
from serve.core.policies.pressure import weight
from serve.core.room import need_of
from serve.core.state import Fleet
from serve.core.step import POLICIES
from serve.core.transaction import Policies, Transaction


def weighing(fleet: Fleet, model: str, now: float, policies: Policies | None = None) -> Sequence[str]:
    """(1) its own weight and bound; (2) the cheapest engines that could go for it, their worth, and what is missing;
    (3) nothing may go."""
    tx = Transaction(fleet, now, policies or POLICIES[fleet.policy.switching])
    if model not in fleet.models or model not in fleet.queues:
        return ()
    one = weight(tx, model)
    many = "waiter weighs" if one.waiters == 1 else f"{one.waiters} waiters weigh"
    said = [
        f"Its {many} {one.seconds:.0f} s; the oldest has waited {one.oldest_s:.0f} s, and its bound is "
        f"{one.bound_s:.0f} s."  # (1)
    ]
    need = need_of(fleet.models[model])
    found = Plan(tx).cheapest(model, need, takes(tx, model, ending=False), claimed=tx.unattended(model))
    if found is None:  # (3)
        said.append("No engine may go for it yet: those that hold its room are pinned, just loaded, or weigh more.")
        return said
    node, chosen = found  # (2)
    names = ", ".join(f"'{engine.model}'" for engine in chosen.engines)
    limit = tx.policies.limit(tx, model)
    price = tx.policies.price(tx, chosen.engines, chosen.cost)
    then = "it goes now" if price <= limit else f"its waiters pay for {limit:.0f} s of that so far"
    cost = f"evicting {names} costs {price:.0f} s of waiting"
    said.append(f"The cheapest room is on node {node.id}: {cost}; {then}.")
    return said
