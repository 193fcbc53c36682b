"""What administrators say: the catalog, load, unload, pin, the end."""

from __future__ import annotations

import math

from gateway_plugin.errors import GoingDown, ModelNotFound, Unloaded
from serve.core.change import Change, live
from serve.core.events import CatalogChanged, GatewayCloses, LoadAsked, PinChanged, UnloadAsked
from serve.core.routes import retire
from serve.core.waiting import answer_all


def catalog_changed(change: Change, event: CatalogChanged) -> None:
    """(1) engines of models that are gone or changed are let go, behind drained routes; (2) waiters of gone ones are
    told; (3) their slots, failures and wishes are forgotten; (4) pins follow the catalog where it says something new.
    """
    before = change.models
    after = {model.name: model for model in event.models}
    change.models = after
    change.names = {name: model.name for model in event.models for name in model.names}
    changed = {name for name, model in after.items() if name in before and model != before[name]}
    gone = set(before) - set(after)
    for name in sorted(gone | {n for n in changed if _other_engine(before[n], after[n])}):
        for engine in change.engines_of(name):  # (1)
            retire(change, engine, "catalog")
        change.failures.drop(name)
        change.load_s.drop(name)
    for name in sorted(gone):
        answer_all(change, name, ModelNotFound(name, tuple(after)))  # (2)
        change.slots.drop(name)  # (3)
    change.pinned = frozenset(  # (4)
        name
        for name, model in after.items()
        if (model.pinned if name not in before or model.pinned != before[name].pinned else name in change.pinned)
    )
    for name in change.wished.rows.keys() - after.keys():
        change.wished.drop(name)
    change.slots_changed = True


def _other_engine(before: object, after: object) -> bool:
    """Whether an engine started for ``before`` is not the one that ``after`` asks for."""
    how_long = {"pinned", "keep_alive_s", "min_residency_s", "load_timeout_s", "drain_timeout_s", "replicas_max"}
    old, new = dict(vars(before)), dict(vars(after))
    return any(old[key] != new[key] for key in old.keys() - how_long)


def load_asked(change: Change, event: LoadAsked) -> None:
    """Wanted once, until ready; a back-off is over."""
    name = change.names.get(event.model)
    if name is not None:
        change.failures.drop(name)
        change.wished.put(name, math.inf)


def unload_asked(change: Change, event: UnloadAsked) -> None:
    """Waiters are refused, pin and wish forgotten, every engine let go; a new request loads it afresh."""
    name = change.names.get(event.model)
    if name is None:
        return
    answer_all(
        change,
        name,
        Unloaded(
            f"The model '{name}' was unloaded by an administrator while the request waited. Ask again to load it.",
            retry_after_s=5.0,
            state="draining" if any(map(live, change.engines_of(name))) else "cold",
        ),
    )
    change.pinned -= {name}
    change.wished.drop(name)
    for engine in change.engines_of(name):
        retire(change, engine, "unloaded")


def gateway_closes(change: Change, event: GatewayCloses) -> None:
    """Every waiter is told so, and no wish of one that left outlives it: no block is asked for any more."""
    for model in sorted(change.queues.rows):
        answer_all(change, model, GoingDown())
    for model in tuple(change.wished.rows):
        change.wished.drop(model)


def pin_changed(change: Change, event: PinChanged) -> None:
    name = change.names.get(event.model)
    if name is not None:
        change.pinned = change.pinned | {name} if event.pinned else change.pinned - {name}
