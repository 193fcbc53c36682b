"""Reports of the ledger and the nodes on blocks."""

from __future__ import annotations

from dataclasses import replace

from serve.core.events import BlocksSeen, NodeLeaves
from serve.core.node_times import queue_waits
from serve.core.transaction import Transaction
from serve.core.transitions import know_block


def blocks_seen(tx: Transaction, event: BlocksSeen) -> None:
    """The present ledger, whole."""
    before = tx.blocks
    tx.blocks = {block.name: block for block in event.blocks}
    tx.queue_wait_s = queue_waits(event.blocks, tx.now)
    news = {name for name, block in tx.blocks.items() if block != before.get(name)}
    for node in [node for node in tx.nodes.rows.values() if node.block in news] if news else ():
        know_block(tx, node)
    tx.joined_blocks &= frozenset(tx.blocks)


def node_leaves(tx: Transaction, event: NodeLeaves) -> None:
    """Its block is about to end; the latest notice counts."""
    node = tx.nodes.rows.get(event.node)
    if node is not None:
        know_block(tx, replace(node, notice_until=event.until))
