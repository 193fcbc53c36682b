"""Host memory of a node for engines that sleep: what each needs, who may sleep, who is stopped so that another may.

Pinned host memory stays with an engine from its first sleep until it exits, awake or not: so ``Node.free_sleep_mib``
counts every engine that has slept once.
"""

from __future__ import annotations

from gateway_plugin.catalog import Model
from serve.core.room import loads_beside
from serve.core.state import Engine, EngineState, Node, live, sleeps, stays
from serve.core.transaction import Transaction

MAY_SLEEP = ("evicted", "idle", "surplus")
"""An engine that drains for one of these reasons may be put to sleep instead of being stopped."""


def most_mib(model: Model) -> int:
    """Upper bound of an engine's weights, until it has slept once: the memory of its GPUs in the catalog."""
    return model.memory_mib * model.gpus


def first_sleep_mib(tx: Transaction, node: Node, model: Model) -> int:
    """Host memory that a new engine of ``model`` may take to sleep once after loading, before it serves; 0: it does
    not.

    The first sleep pins host memory of the weights' size, at about 1 GiB/s: 14 to 21 s with 15 GiB of weights, 60 s
    with 61 GiB. Each later one took 0.4 to 1.4 s (docs/switching.md). That time is paid once in any case. At the first
    eviction the model that waits for the room would pay it, and wait as long as for a load; after loading it is part of
    the load time, which is measured and expected anyway, each eviction is quick, and an engine that cannot sleep is
    found out before it has a request. It is left out where the node has no host memory left for it (no other engine is
    stopped for that), and where a sleep of the model went wrong.
    """
    if not (tx.policy.sleep_once_loaded and model.sleeps) or model.name in tx.sleep_doubts.rows:
        return 0
    needed_mib = most_mib(model)
    return needed_mib if needed_mib <= node.free_sleep_mib else 0


def may_sleep(tx: Transaction, engine: Engine) -> bool:
    """Whether a drained engine is put to sleep rather than stopped, if there is host memory.

    (1) its agent can, and its model does; (2) the edge reported nothing in flight (at the drain's deadline it is
    stopped); (3) its node takes commands and its end is not near; (4) its sleeps have not gone wrong too often.
    """
    model = tx.models.get(engine.model)
    node = tx.nodes.rows[engine.node]
    return (
        engine.can_sleep and model is not None and model.sleeps and len(engine.parts) == 1  # (1)
        and engine.drained_idle  # (2)
        and stays(node) and not node.drain_asked  # (3)
        and tx.sleep_doubts.rows.get(engine.model, 0) < tx.policy.sleep_doubts_max  # (4)
    )  # fmt: skip


def could_sleep(tx: Transaction, engine: Engine) -> bool:
    """Whether it would most likely sleep if it were evicted now: nothing else has to be stopped for that."""
    model = tx.models.get(engine.model)
    if not engine.can_sleep or model is None or not model.sleeps or len(engine.parts) != 1:
        return False
    if tx.sleep_doubts.rows.get(engine.model, 0) >= tx.policy.sleep_doubts_max:
        return False
    return engine.slept or most_mib(model) <= tx.nodes.rows[engine.node].free_sleep_mib


def outlived(tx: Transaction, engine: Engine) -> bool:
    """Whether its model can do without an engine that sleeps: another one serves or is going to, or a younger one
    sleeps, or will when it has drained. Of two that sleep the younger one stays: it was loaded where there was more
    room."""
    for other in tx.engines_of(engine.model):
        asleep = sleeps(other) or (other.state is EngineState.DRAINING and other.stop_reason in MAY_SLEEP)
        younger = (other.started, other.id) > (engine.started, engine.id)
        if other.id != engine.id and (live(other) or (asleep and younger)):
            return True
    return False


def room_for_sleep(tx: Transaction, engine: Engine) -> tuple[Engine, ...] | None:
    """The engines asleep to stop so that ``engine`` can sleep, the least valuable first; ``()``: there is room, or it
    is being freed (``being_freed_mib``); ``None``: there is none.

    (1) it slept before: its memory is its own; (2) there is room; (3) of the engines asleep on its node that are worth
    less than it (``Policies.sleep_worth``), are not wanted and can be stopped at once, the fewest of the least worth;
    (4) not enough.
    """
    if engine.slept:  # (1)
        return ()
    node = tx.nodes.rows[engine.node]
    lacking_mib = most_mib(tx.models[engine.model]) - node.free_sleep_mib - being_freed_mib(tx, node)
    if lacking_mib <= 0:  # (2)
        return ()
    rank = tx.policies.sleep_worth
    worth = (rank(tx, engine), engine.id)
    engines = [tx.engines.rows[name] for name in node.engines]
    asleep = [one for one in engines if one.state is EngineState.ASLEEP and loads_beside(one, engines) is None]
    asleep.sort(key=lambda one: (rank(tx, one), one.id))
    chosen: list[Engine] = []
    for one in asleep:  # (3)
        if lacking_mib <= 0 or (rank(tx, one), one.id) > worth:
            break
        if not tx.wanted(one.model):
            chosen.append(one)
            lacking_mib -= one.sleep_mib
    return tuple(chosen) if lacking_mib <= 0 else None  # (4)


def being_freed_mib(tx: Transaction, node: Node) -> int:
    """Host memory of engines on ``node`` whose stop was sent."""
    engines = (tx.engines.rows[name] for name in node.engines)
    return sum(one.sleep_mib for one in engines if one.state is EngineState.STOPPING and one.stop_sent)
