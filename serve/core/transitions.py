"""State machines of engines, routes and nodes: the steps that several handlers and policies share."""

from __future__ import annotations

from gateway_plugin.errors import GatewayError, ModelUnavailable
from gateway_plugin.phases import BlockPhase
from serve.core.effects import Answer, KillAgent, SleepEngine, WakeEngine
from serve.core.events import SeenBlock
from serve.core.frozen import replace
from serve.core.node_times import LATELY
from serve.core.policy import DOUBT_S, REOPENS_S, Policy
from serve.core.reasons import decide_keep, decide_stop, decide_wait
from serve.core.room import unsettles
from serve.core.shares import release_order
from serve.core.sleep_room import MAY_SLEEP
from serve.core.state import (
    Action,
    Apart,
    ClosingRoute,
    Engine,
    EngineState,
    Failure,
    Node,
    NodePhase,
    RouteState,
    serving,
)
from serve.core.transaction import Transaction


def mark_granted(tx: Transaction, model: str) -> None:
    """A request is on its way to any of these: they are not idle for a moment."""
    for engine in tx.engines_of(model):
        if serving(engine):
            tx.set_engine(engine, granted_at=tx.now)


def answer_all(tx: Transaction, model: str, error: GatewayError | None) -> None:
    """One answer for every waiter of ``model``, in the order of release."""
    for waiter in release_order(tx.waiting(model)):
        tx.drop_waiter(waiter.ticket)
        tx.emit(Answer(waiter.ticket, error))


def record_failure(
    tx: Transaction,
    model: str,
    reason: str,
    summary: str | None = None,
    *,
    after_ready: bool = False,
    on_board: bool = False,
) -> None:
    """Count a failed load, or a crash shortly after ready, and refuse the waiters after enough of them.

    ``summary``: for users, of a reason that only administrators may see. ``on_board``: requests were in flight, and may
    be the cause. Back-off: ``retry_first_s`` doubled with each in a row up to ``retry_max_s``; a first crash after
    ready costs none, nor do those with requests in flight before there were ``crashes_per_wait`` of them.
    """
    last = tx.failures.rows.get(model)
    count = 1 + (last.count if last is not None and last.after_ready == after_ready else 0)
    policy = tx.policy
    enough = policy.crashes_per_wait if on_board else policy.failures_per_wait
    doublings = min(count - (enough if on_board else 1 + after_ready), 30)
    delay = 0.0 if doublings < 0 else min(policy.retry_max_s, policy.retry_first_s * 2.0**doublings)
    failure = Failure(count, tx.now, tx.now + delay, reason, after_ready, summary or reason)
    tx.failures.put(model, failure)
    decide_wait(tx, model, failure)
    if count >= enough:
        tx.requested_until.drop(model)
        answer_all(tx, model, unavailable(model, failure, tx.now))


def unavailable(model: str, failure: Failure, now: float) -> ModelUnavailable:
    wait_s = max(1.0, failure.retry_at - now)
    return ModelUnavailable(
        f"The engine of model '{model}' failed {failure.count} times in a row, the last time: "
        f"{failure.summary.rstrip('.')}. It is tried again for requests that come after {wait_s:.0f} s.",
        retry_after_s=wait_s,
        state="failed",
        eta_s=None,
        detail=failure.reason,
    )


# --- target states of an engine; commands follow in ``serve.core.policies.commands`` ---
def begin_stop(tx: Transaction, engine: Engine, reason: str) -> Engine:
    """End an engine, or for some reasons put it to sleep (``serve.core.policies.commands``):

    (1) it stops already; (2) it falls asleep, and only its GPUs are needed; (3) no request can have reached it: stop;
    (4) drain its route first."""
    if engine.state is EngineState.STOPPING:  # (1)
        return engine
    decide_stop(tx, engine, reason)
    if engine.state is EngineState.DRAINING:
        return tx.set_engine(engine, stop_reason=reason)
    if engine.state is EngineState.FALLING_ASLEEP and reason in MAY_SLEEP:  # (2)
        return engine
    if engine.server is None:  # (3)
        return tx.set_engine(
            engine, state=EngineState.STOPPING, since=tx.now, stop_reason=reason, stop_sent=False,
            stopped_asleep=engine.state is EngineState.ASLEEP,
        )  # fmt: skip
    return tx.set_engine(  # (4)
        engine, state=EngineState.DRAINING, since=tx.now, stop_reason=reason, drained=False, drained_idle=False
    )


def can_cancel_drain(engine: Engine) -> bool:
    """It drains for a reason that demand for its own model may overrule, and no stop was sent."""
    may = (*MAY_SLEEP, "slot-needed", "handed-over")
    return engine.state is EngineState.DRAINING and engine.stop_reason in may


def cancel_drain(tx: Transaction, engine: Engine) -> bool:
    """Undo a drain: (1) not sent yet: nothing to do; (2) acknowledged: open the route again; (3) under way: not now."""
    if engine.route is RouteState.DRAINING:
        if not engine.drained:  # (3)
            return False
        engine = tx.set_engine(engine, route=RouteState.NONE, up=False, refusals=0, retry_at=0.0)  # (2)
    decide_keep(tx, engine)
    tx.set_engine(  # (1)
        engine, state=EngineState.READY, since=tx.now, stop_reason="", drained=False, drained_idle=False,
        granted_at=tx.now,
    )  # fmt: skip
    return True


def close_route(tx: Transaction, engine: Engine) -> Engine:
    """Its server goes to ``maint``, as soon as no earlier command for it is under way. No-op without a server."""
    if engine.server is None or engine.slot is None:
        return engine
    under_way = engine.route is RouteState.OPENING or (engine.route is RouteState.DRAINING and not engine.drained)
    tx.closing.put(engine.id, ClosingRoute(engine.id, engine.slot, engine.server, since=tx.now, pending=under_way))
    return tx.set_engine(engine, route=RouteState.NONE, server=None, up=False, in_flight=0)


# --- the warm tier ---
def begin_sleep(tx: Transaction, engine: Engine, sleep_mib: int) -> None:
    """Put a drained engine to sleep: its route is closed before. ``sleep_mib``: host memory that it may hold then."""
    engine = close_route(tx, engine)
    tx.set_engine(engine, state=EngineState.FALLING_ASLEEP, since=tx.now, sleep_mib=sleep_mib)
    tx.emit(SleepEngine(engine.id, engine.node, tx.epoch))
    because = f"it was {engine.stop_reason}, and {sleep_mib / 1024:.1f} GiB of its node's host memory hold its weights"
    tx.decide(Action.SLEEP, engine.model, because, engine=engine.id)


def fell_asleep(tx: Transaction, engine: Engine, sleep_mib: int, kept_mib: int) -> None:
    """Its GPUs are free but for ``kept_mib`` on each."""
    kept_mib = max(0, min(kept_mib, *(part.mib for part in engine.parts)))
    tx.set_engine(
        engine, state=EngineState.ASLEEP, since=tx.now, stop_reason="", slept=True, sleep_mib=sleep_mib,
        kept_mib=kept_mib,
    )  # fmt: skip


def begin_wake(tx: Transaction, engine: Engine) -> bool:
    """Wake an engine, on the GPUs where it fell asleep; ``False``: not now.

    (1) it does not sleep, or a node of it does not take commands or leaves; (2) their memory is in use, or something
    loads, stops, falls asleep or wakes there.
    """
    if engine.state is not EngineState.ASLEEP or any(node.phase is not NodePhase.UP for node in tx.nodes_of(engine)):
        return False  # (1)
    rows = tx.nodes.rows
    if any(
        rows[part.node].free_gpu_mib[gpu] < part.mib - engine.kept_mib for part in engine.parts for gpu in part.gpus
    ):
        return False
    beside = {name for part in engine.parts for name in rows[part.node].engines} - {engine.id}
    for other in (tx.engines.rows[name] for name in beside):
        if unsettles(other, due=other.drained_idle) and not engine.devices.isdisjoint(other.devices):
            return False  # (2)
    tx.set_engine(engine, state=EngineState.WAKING, since=tx.now)
    tx.emit(WakeEngine(engine.id, engine.node, tx.epoch))
    because = f"it is wanted, and its engine sleeps on {engine.node}: {tx.wake_time_s(engine.model):.1f} s"
    tx.decide(Action.WAKE, engine.model, because, engine=engine.id)
    return True


def woke(tx: Transaction, engine: Engine, took_s: float | None) -> None:
    """It answers as before: its route may open."""
    tx.set_engine(engine, state=EngineState.READY, since=tx.now, awake_at=tx.now, granted_at=tx.now, stop_reason="")
    tx.sleep_doubts.drop(engine.model)
    if took_s is not None:
        tx.wake_s.put(engine.model, took_s)


def doubt_sleep(tx: Transaction, model: str) -> None:
    """An engine of it was ended because its sleep or its waking went wrong."""
    tx.sleep_doubts.put(model, tx.sleep_doubts.rows.get(model, 0) + 1)


def suspect_route(tx: Transaction, model: str) -> None:
    """The edge had no usable server for a released request: not up until the edge reports it again."""
    for engine in tx.engines_of(model):
        if engine.route is RouteState.OPEN:
            tx.set_engine(engine, up=False, fresh_from=tx.now)


def forget(tx: Transaction, engine: Engine) -> None:
    """Its process is gone."""
    close_route(tx, engine)
    tx.drop_engine(tx.engines.rows[engine.id])


def made_ready(
    tx: Transaction,
    engine: Engine,
    address: str,
    load_s: float | None,
    *,
    can_sleep: bool = False,
    sleep_mib: int = 0,
) -> None:
    """It answered a real request. ``sleep_mib``: host memory that it holds if it slept once after loading."""
    tx.set_engine(
        engine,
        state=EngineState.READY,
        since=tx.now,
        loaded_s=max(0.0, tx.now - engine.started),
        address=address,
        unwanted_since=None,
        granted_at=tx.now,
        can_sleep=can_sleep,
        slept=sleep_mib > 0,
        sleep_mib=sleep_mib,
    )
    if load_s is not None:
        tx.load_s.put(engine.model, load_s)
    failure = tx.failures.rows.get(engine.model)
    if failure is not None and not failure.after_ready:
        tx.failures.drop(engine.model)


def lose(tx: Transaction, node: Node) -> None:
    """The node is gone, and its engines with it."""
    for engine in node.engines:
        forget(tx, tx.engines.rows[engine])
    tx.nodes.drop(node.id)
    tx.unsettled -= {node.id}


def begin_stop_all(tx: Transaction, node: str, reason: str) -> None:
    for engine in tx.nodes.rows[node].engines:
        begin_stop(tx, tx.engines.rows[engine], reason)


def know_block(tx: Transaction, node: Node) -> None:
    """Put ``node`` with the known end of its block; and remember how long it took to start.

    (1) its walltime; (2) its block is being cancelled without a notice: as if it had one; (3) a notice: it leaves
    now and ends at the notice's time; (4) its block has ended (the node may seem alive for a while): at once; (5) it
    has more time than expected: no longer near its end.
    """
    block = tx.blocks.get(node.block)
    drain_at, leave_at = _by_walltime(block, tx.policy)  # (1)
    if block is not None and block.phase is BlockPhase.CANCELLING and node.notice_until is None:  # (2)
        node = replace(node, notice_until=tx.now + tx.policy.notice_s)
    ended = block is not None and block.phase.ended
    if node.notice_until is not None or ended:  # (3)
        drain_at = _earliest(drain_at, node.drain_at, tx.now)
        leave_at = _earliest(leave_at, node.notice_until)
    if block is not None and ended:  # (4)
        leave_at = _earliest(leave_at, block.ended_at, tx.now)
    ends_at = node.ends_at if block is None else block.ends_at
    half_at = None
    if drain_at is not None:
        # A block that took long to start is not past its half before it was of any use: nothing would ever be loaded.
        began = node.since if block is None or block.starts_at is None else block.starts_at
        began = began if node.joined_at is None else node.joined_at
        half_at = drain_at - max(0.0, drain_at - began) / 2
    later = node.drain_at is None or drain_at is None or drain_at > node.drain_at  # (5)
    ending = node.ending and not later
    changed = replace(node, ends_at=ends_at, drain_at=drain_at, half_at=half_at, leave_at=leave_at, ending=ending)
    if changed != tx.nodes.rows.get(node.id):
        tx.nodes.put(node.id, changed)
    started = block is not None and not block.phase.queued  # else the ledger is behind: it names an expected start
    if block is not None and started and block.starts_at is not None and node.joined_at is not None:
        took = tx.block_start_s.rows.get(node.type, ())
        if all(name != node.id for name, _ in took):
            last = (node.id, max(0.0, node.joined_at - block.starts_at))
            tx.block_start_s.put(node.type, (*took, last)[-LATELY:])


def _earliest(*times: float | None) -> float | None:
    return min((time for time in times if time is not None), default=None)


def _by_walltime(block: SeenBlock | None, policy: Policy) -> tuple[float | None, float | None]:
    """When a node of ``block`` takes no new request, and when it leaves."""
    if block is None or block.ends_at is None:
        return None, None
    leave_at = block.ends_at - policy.leave_before_end_s
    before = policy.drain_before_end_s
    if block.starts_at is not None:
        before = min(before, max(0.0, block.ends_at - block.starts_at) / 4)
    return leave_at - before, leave_at


def keep_apart(tx: Transaction, model: str, for_s: float, opens: float = 0.0) -> None:
    """For ``for_s`` seconds the edge sends all requests of ``model`` to the ingress, from before the next route opens.

    ``opens``: when that may be.
    """
    found = tx.apart.rows.get(model)
    tx.slots_changed |= found is None
    until = tx.now + for_s
    if found is not None:
        until, opens = max(found.until, until), max(found.opens, opens)
    tx.apart.put(model, Apart(tx.now if found is None else found.since, until, opens))


def after_death(tx: Transaction, model: str) -> None:
    """One of its engines died, perhaps by a request in flight."""
    keep_apart(tx, model, DOUBT_S, tx.now + REOPENS_S)


def may_open(tx: Transaction, model: str) -> bool:
    """A route to an engine of it opens."""
    apart = tx.apart.rows.get(model)
    return apart is None or tx.now >= apart.opens


def release_node(tx: Transaction, node: Node) -> None:
    """End the agent of an empty node: its block goes."""
    tx.nodes.drop(node.id)
    tx.unsettled -= {node.id}
    tx.emit(KillAgent(node.id))


def drain_node(tx: Transaction, node: Node) -> None:
    """Its engines are drained and stopped; scaling releases it when it is empty."""
    phase = NodePhase.LEAVING if node.phase is NodePhase.UP else node.phase
    tx.nodes.put(node.id, replace(node, phase=phase, drain_asked=True))
    begin_stop_all(tx, node.id, "node-leaving")
