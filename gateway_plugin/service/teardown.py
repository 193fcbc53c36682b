"""End the processes of this gateway and no others: head, blocks, engines, edge. Used by the supervisor, and by ``down``
without one.

The head goes first: a live autoscaler would replace cancelled blocks. Every process is identified by PID and start, by
the gateway's state folder in its arguments, or by Ray's folder.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from parsl.providers import LocalProvider

from gateway_plugin.blocks.ledger import Block, BlockPhase, Ledger, LedgerGarbled
from gateway_plugin.blocks.pool import CANCEL_GRACE_S, BlockPool, end_all
from gateway_plugin.blocks.recovery import whole_ledger
from gateway_plugin.engine_records import end_engines
from gateway_plugin.errors import GatewayError
from gateway_plugin.paths import Layout
from gateway_plugin.processes import Mark, alive, arguments, end
from gateway_plugin.schedulers.base import Scheduler, script_folder
from gateway_plugin.schedulers.local import LocalScheduler
from gateway_plugin.schedulers.select import schedulers_for
from gateway_plugin.service import ray_head
from gateway_plugin.service.discovery import deployments_of, edges_of, heads_of, supervisors_of
from gateway_plugin.site import Site

BLOCKS_DEADLINE_S = CANCEL_GRACE_S + 15.0
EDGE_GRACE_S = 3.0
ENGINE_GRACE_S = 5.0
HEAD_GRACE_S = 5.0

Tell = Callable[[str], None]


@contextlib.contextmanager
def shielded_from_signals() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM, so that a second Ctrl-C does not interrupt the cleanup."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_everything(
    layout: Layout, site: Site | None, tell: Tell, *, keep: Mark | None = None, forced: bool = False
) -> tuple[str, ...]:
    """End all processes of this gateway, except ``keep``, the supervisor that calls.

    ``site`` is needed to cancel blocks. Without it (``None``: it can no longer be loaded) blocks are left, and named;
    ``forced`` ends those of this machine all the same. ``forced`` kills without a grace period.

    Returns:
        Messages on what could not be ended: normally none.
    """
    left: list[str] = []
    tell("supervisor")
    others = [known for known in supervisors_of(layout) if keep is None or known.pid != keep.pid]
    left += _names("supervisor", (known.pid for known in end(others, grace_s=0.0)))
    left += _names("deployment", (known.pid for known in end(deployments_of(layout), grace_s=0.0)))
    tell("Ray head")
    head = next(iter(heads_of(layout)), None)
    left += _names("Ray head", end_head(layout, head, grace_s=0.0 if forced else HEAD_GRACE_S))
    tell("blocks")
    left += end_blocks(layout, site, forced)
    tell("engines")
    records = end_engines(layout.engine_records, grace_s=0.0 if forced else ENGINE_GRACE_S)
    left += [f"engine {name.removesuffix('.json')}" for name in records]
    tell("edge")
    edges = end(edges_of(layout), grace_s=0.0 if forced else EDGE_GRACE_S)
    left += _names("edge", (known.pid for known in edges))
    if not left:
        for path in (layout.edge_socket, layout.inner_door, layout.supervisor_status, *layout.run.glob("*.sock")):
            path.unlink(missing_ok=True)
    return tuple(left)


def head_runs(layout: Layout) -> bool:
    """Whether any process of this gateway's Ray head lives."""
    return bool(ray_head.leftover_processes(layout))


def end_head(layout: Layout, head: Mark | None, *, grace_s: float) -> tuple[int, ...]:
    """End ``ray start --head`` and all processes that use its folder; blocks live on. Returns PIDs of those that still
    live."""
    if head is not None and alive(head) and "--head" in arguments(head.pid):
        end([head], grace_s=grace_s)
    return tuple(process.pid for process in ray_head.end_leftovers(layout, grace_s))


def open_pool(layout: Layout, site: Site) -> BlockPool:
    """The blocks of the ledger, without Ray. Only while no autoscaler lives: the ledger has one writer."""
    schedulers = _schedulers(layout, site)
    return BlockPool(
        whole_ledger(layout, schedulers),
        schedulers,
        {node_type.name: node_type.max_blocks for node_type in site.node_types},
        marks=layout.leave_marks,
    )


def has_blocks(layout: Layout, site: Site | None) -> bool:
    """Whether the ledger names a block whose job is pending or running, or cannot be queried. Changes nothing.

    A garbled ledger may name any.
    """
    try:
        ours, orphans = _held(layout, site)
    except LedgerGarbled:
        return True
    if site is None or orphans or not ours:
        return bool(orphans)
    schedulers = _schedulers(layout, site)
    for block in ours:
        seen = schedulers[block.type].status([block]).get(block.name)
        if block.job is not None and (seen is None or not seen.phase.ended):
            return True
    return False


def end_blocks(layout: Layout, site: Site | None, forced: bool) -> list[str]:
    """Cancel every block that the ledger names and wait. Returns messages on what could not be ended.

    Blocks that the site does not list (any more) are left, and with ``forced`` ended if they are of this machine.
    """
    try:
        schedulers = _schedulers(layout, site)
        whole_ledger(layout, schedulers, _local(layout) if site is None else None)
        ours, orphans = _held(layout, site)
        if orphans and not forced:
            return [f"block {block.name} (its site cannot be loaded, or has no {block.type!r})" for block in orphans]
        if forced:
            for block in ours:
                schedulers[block.type].cancel(block, forced=True)
        left = _end_orphans(layout, orphans)
        if left or site is None or not ours:
            return left
        return [f"block {block.name}" for block in end_all(open_pool(layout, site), BLOCKS_DEADLINE_S)]
    except GatewayError as error:
        return [error.message]
    except OSError as error:
        return [f"blocks ({layout.ledger}: {error.strerror or error})"]


def _schedulers(layout: Layout, site: Site | None) -> dict[str, Scheduler]:
    return schedulers_for(site.node_types, layout) if site is not None else {}


def _held(layout: Layout, site: Site | None) -> tuple[list[Block], list[Block]]:
    """Blocks of the ledger that have not ended: those of the site's node types, and the others."""
    types = {node_type.name for node_type in site.node_types} if site is not None else set()
    held = [block for block in Ledger(layout.ledger).read().values() if not block.phase.ended]
    return [block for block in held if block.type in types], [block for block in held if block.type not in types]


def _end_orphans(layout: Layout, orphans: list[Block]) -> list[str]:
    """End blocks of this machine by PID, start and mark, without their site, and record them as lost.

    A job in a queue cannot be cancelled without its provider: it is named, and stays in the ledger.
    """
    if not orphans:
        return []
    local = _local(layout)
    ledger = Ledger(layout.ledger)
    left: list[str] = []
    for block in orphans:
        if block.job is not None and block.job.pid is None:
            left.append(f"block {block.name} (job {block.job.id}: end it with the scheduler's own command)")
            continue
        local.cancel(block, forced=True)

        keeper = block.job.mark if block.job is not None else None
        if end([keeper] if keeper is not None else [], 0.0) or local.find(block.name) is not None:
            left.append(f"block {block.name}")
            continue
        lost = block.ending(BlockPhase.LOST, time.time(), "ended by force; its site could not be loaded")
        ledger.write({**ledger.read(), block.name: lost})
    return left


def _local(layout: Layout) -> Scheduler:
    return LocalScheduler(LocalProvider(), script_folder(layout), layout)


def _names(what: str, pids: Iterable[int]) -> list[str]:
    return [f"{what} (pid {pid})" for pid in pids]
