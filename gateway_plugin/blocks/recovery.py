"""Recovery of a garbled ledger from the live jobs, which are found by their blocks' names."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from gateway_plugin.blocks.ledger import Block, BlockPhase, Ledger, LedgerGarbled
from gateway_plugin.errors import GatewayError
from gateway_plugin.paths import Layout
from gateway_plugin.schedulers.base import Scheduler, script_place

log = logging.getLogger(__name__)


def whole_ledger(layout: Layout, jobs: Mapping[str, Scheduler], others: Scheduler | None = None) -> Ledger:
    """A readable ledger: a garbled one is set aside, and a new one written with the jobs found.

    Only while no other process writes it. ``others``: the jobs of node types that are not in ``jobs``.
    Raises ``OSError`` if it cannot be written; nothing was changed then.
    """
    ledger = Ledger(layout.ledger)
    try:
        ledger.read()
    except LedgerGarbled:
        found = _found(layout, jobs, others)
        aside = ledger.begin_anew({block.name: block for block in found})
        log.warning("ledger garbled set_aside=%s found=%s", aside, [block.name for block in found])
    return ledger


def _found(layout: Layout, jobs: Mapping[str, Scheduler], others: Scheduler | None) -> list[Block]:
    """A block for each job file whose job (1) is there, or (2) cannot be searched for now: then it is in doubt."""
    asked_at = {
        file.name.partition(".")[0]: file.stat().st_mtime for file in sorted(script_place(layout).glob("gw-*.*"))
    }
    found = []
    for name, at in asked_at.items():
        node_type = name.removeprefix("gw-").rpartition("-")[0]
        of_type = jobs.get(node_type, others)
        if of_type is None:
            continue
        try:
            job = of_type.find(name)
        except GatewayError as error:  # (2)
            found.append(Block(name, node_type, BlockPhase.SUBMITTING, at, reason=error.message))
            continue
        if job is not None:  # (1)
            found.append(Block(name, node_type, BlockPhase.PENDING, at, job))
    return found
