"""``gateway blocks``: running jobs that hold nodes, and pending ones."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from gateway_plugin.cli.connection import connect, demand_at_hand
from gateway_plugin.cli.output import Steps, duration, json_option, put, read_terminal, say, settings, show, table
from gateway_plugin.errors import NotFound
from gateway_plugin.masking import masked

if TYPE_CHECKING:
    from gateway_plugin.client import Client

Row = Mapping[str, Any]

_COLUMNS = ("block", "job", "type", "state", "host", "age", "until", "models, or why")
_WHOLE = ("block", "job", "state", "age")
_POLL_S = 0.5


@click.group()
def blocks() -> None:
    """Blocks: list, drain, cancel, logs, retry."""


@blocks.command("list")
@click.option("--all", "ended", is_flag=True, help="Those that ended recently too, and how.")
@json_option
def list_blocks(ended: bool) -> None:
    """Every block of the gateway, pending ones too."""
    with connect() as client:
        found = client.blocks(ended=ended)
    show(found, lambda: table(_COLUMNS, [_cells(row) for row in found], whole=_WHOLE))


def _cells(row: Row) -> tuple[object, ...]:
    """The cells of one row of the table."""
    until = None
    if row["ended_s"] is not None:
        until = f"ended {duration(row['ended_s'])} ago"
    elif row["starts_in_s"] is not None:
        until = f"starts in {duration(row['starts_in_s'])}"
    elif row["leaves_in_s"] is not None and row["state"] in ("draining", "leaving"):
        until = f"leaves in {duration(row['leaves_in_s'])}"
    elif row["ends_in_s"] is not None:
        until = f"ends in {duration(row['ends_in_s'])}"
    models = ", ".join(_model(model) for model in row["models"])
    return (
        row["name"], row["job"], row["type"], row["state"], row["host"], duration(row["age_s"]), until,
        models or row["reason"],
    )  # fmt: skip


def _model(model: Row) -> str:
    """``NAME``, with its state unless it is ready, and its requests in flight, if any."""
    notes = [model["state"]] if model["state"] != "ready" else []
    notes += [f"{model['in_flight']} in flight"] if model["in_flight"] else []
    return f"{model['model']} ({', '.join(notes)})" if notes else str(model["model"])


@blocks.command()
@click.argument("name")
@click.option("--wait", is_flag=True, help="Wait until it has gone.")
@json_option
def drain(name: str, wait: bool) -> None:
    """Release a block as soon as nothing is in flight on it."""
    with connect() as client:
        client.drain_block(name)
        if not wait:
            show({"block": name, "done": "drain"}, lambda: say(f"{name} is being drained"))
            return
        began = time.monotonic()
        try:
            last = _until_gone(client, name, began)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            put(f"{name} goes on draining; see 'gateway blocks list'", err=True)
            raise
    seconds = round(time.monotonic() - began, 1)
    words = f"{name} has gone after {duration(seconds)}"
    show({"block": name, "done": "drain", "seconds": seconds, "ended": last}, lambda: say(words))


def _until_gone(client: Client, name: str, began: float) -> Row | None:
    """Show the drain of ``name`` (of a block, or its node) until its end; return the ended block's row, if known."""
    block = name
    with Steps("draining") as steps:
        while True:
            found = client.blocks(ended=True)
            row = next((row for row in found if block in (row["name"], row["node"])), None)
            if row is None or row["ended_s"] is not None:
                return row
            block = row["name"] or block  # a node is removed before its block has ended
            steps.update([(block, row["state"], str(_cells(row)[-1] or ""))], time.monotonic() - began)
            time.sleep(_POLL_S)


@blocks.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
def cancel(names: Sequence[str], yes: bool) -> None:
    """End blocks at once, in the queue or running. Requests in flight are cut; 'drain' waits for them instead."""
    with connect() as client:
        rows = {row["name"]: row for row in client.blocks(ended=True) if row["name"]}
        chosen = [rows[name] if name in rows else _unknown(name, rows) for name in dict.fromkeys(names)]
        for row in chosen:
            if row["ended_s"] is not None:
                ago = duration(row["ended_s"])
                raise NotFound(f"The block {row['name']} ended {ago} ago ({row['state']}); nothing was cancelled.")
        if not yes and not settings().json and read_terminal():
            for row in chosen:
                put(f"{row['name']}: {row['state']}{_cut(row)}", err=True)
            click.confirm(f"End {'it' if len(chosen) == 1 else f'these {len(chosen)}'} now?", abort=True, err=True)
        for row in chosen:
            client.cancel_block(row["name"])
            say(f"{row['name']} is being ended{_cut(row)}")
    document = [
        {"block": row["name"], "done": "cancel", "state": row["state"], "cut": row["in_flight"]} for row in chosen
    ]
    show(document, lambda: None)


def _unknown(name: str, rows: Mapping[str, Row]) -> Row:
    there = ", ".join(known for known, row in rows.items() if row["ended_s"] is None) or "none"
    raise NotFound(f"No block is called '{name}'. There are: {there}. Nothing was cancelled.")


def _cut(row: Row) -> str:
    """Message about the requests that cancelling a block cuts; empty if there are none."""
    count = row["in_flight"]
    requests = "1 request in flight is" if count == 1 else f"{count} requests in flight are"
    return f"; {requests} cut" if count else ""


@blocks.command()
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is added.")
@click.option("-n", "--lines", default=50, show_default=True, type=click.IntRange(0), help="Lines from each end.")
@json_option
def logs(name: str, follow: bool, lines: int) -> None:
    """Show the output of a block and its job, ended ones too. Read from the state folder."""
    from gateway_plugin.paths import Layout
    from gateway_plugin.service import logs as log_files

    demand_at_hand("The logs of blocks")
    layout = Layout.of(settings().state)
    found = log_files.block_logs(layout, name)
    secrets = log_files.secrets_in_force(layout)
    last = {
        label: [masked(line, secrets) for line in log_files.last_lines(path, lines)] for label, path in found.items()
    }
    if settings().json and not follow:
        show([{"log": label, "path": str(found[label]), "lines": last[label]} for label in found], lambda: None)
        return
    for label, path in found.items():
        if last[label]:
            put(f"==> {label}: {path} <==")
            put("\n".join(last[label]))
    if not any(path.stat().st_size for path in found.values()):
        put(f"{name} has not written anything yet", err=True)
    shown = label if found else ""
    if follow:
        for label, line in log_files.follow_all(lambda: log_files.block_logs(layout, name)):
            if label != shown:
                put(f"==> {label} <==")
                shown = label
            put(masked(line, secrets))


@blocks.command()
@click.argument("node_type", metavar="TYPE")
@json_option
def retry(node_type: str) -> None:
    """Request blocks of a node type again at once, when the cause of their failures has been fixed."""
    with connect() as client:
        client.retry_blocks(node_type)
    show({"type": node_type, "done": "retry"}, lambda: say(f"blocks of type {node_type} are asked for again"))
