"""``gateway blocks``: the jobs that hold nodes."""

from __future__ import annotations

import click

from gateway_plugin.cli.connection import connect
from gateway_plugin.cli.output import json_option, say, show, table

_COLUMNS = ("block", "id", "type", "phase", "free_mib", "host_mib", "age_s")


@click.group()
def blocks() -> None:
    """Blocks: list, drain."""


@blocks.command("list")
@json_option
def list_blocks() -> None:
    """Every block and the node that it holds."""
    with connect() as client:
        found = client.blocks()
    show(found, lambda: table(_COLUMNS, [tuple(block.get(column) for column in _COLUMNS) for block in found]))


@blocks.command()
@click.argument("name")
@json_option
def drain(name: str) -> None:
    """Give a block back as soon as nothing is in flight on it."""
    with connect() as client:
        client.drain_block(name)
    show({"block": name, "done": "drain"}, lambda: say(f"{name} is being drained"))


@blocks.command()
@click.argument("node_type", metavar="TYPE")
@json_option
def retry(node_type: str) -> None:
    """Ask for blocks of a type again at once, when what kept them from starting has been put right."""
    with connect() as client:
        client.retry_blocks(node_type)
    show({"type": node_type, "done": "retry"}, lambda: say(f"blocks of type {node_type} are asked for again"))
