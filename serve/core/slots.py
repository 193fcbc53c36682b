"""Slots at the edge: the assignment of slots to models."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from gateway_plugin.catalog import Model
from serve.core.effects import SyncSlots
from serve.core.looking import slots_taken
from serve.core.table import seen
from serve.core.transaction import Transaction


# --- commands ---
def slots_as_they_are(
    models: Mapping[str, Model], slots: Mapping[str, int], apart: Collection[str], fresh: tuple[int, ...] = ()
) -> SyncSlots:
    """Slots and the models kept apart, under all names of each model, for the edge."""
    names = {name: slot for model, slot in sorted(slots.items()) for name in models[model].names}
    kept_apart = frozenset(name for model in slots.keys() & set(apart) for name in models[model].names)
    return SyncSlots(names, fresh, kept_apart)


# --- slots ---
def slots_in_use(tx: Transaction) -> set[int]:
    """Slots with an engine or a server in them."""
    return {closing.slot for closing in tx.closing.rows.values()} | seen(tx.engines.rows, slots_taken)


def free_slot(tx: Transaction, model: str, in_use: set[int]) -> int | None:
    """The slot ``model`` may have: (1) its own; (2) a free one; (3) one whose model has no engine, preferably one
    without demand; (4) none. A slot with any engine or server of an earlier tenant is in use."""
    slot = tx.slots.rows.get(model)
    if slot is not None:  # (1)
        return slot
    for index in seen(tx.slots.rows, _without_tenant, tx.policy.slots):
        if index not in in_use:  # (2)
            return index
    free = [(tx.wanted(tenant), slot) for tenant, slot in tx.slots.rows.items() if slot not in in_use]
    return min(free)[1] if free else None  # (3), (4)


def _without_tenant(slots: Mapping[str, int], many: int) -> Sequence[int]:
    taken = set(slots.values())
    return [index for index in range(many) if index not in taken]


def take_slot(tx: Transaction, model: str, slot: int) -> None:
    """Assign ``slot``, as found by ``free_slot``, to ``model``; a new tenant means a new engine key."""
    if tx.slots.rows.get(model) == slot:
        return
    for tenant, taken in list(tx.slots.rows.items()):
        if taken == slot:
            tx.slots.drop(tenant)
    tx.slots.put(model, slot)
    tx.slots_changed = True
    tx.fresh_slots = (*tx.fresh_slots, slot)
