"""``gateway endpoint``: the Globus Compute endpoint that lets remote workflows call this gateway."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway_plugin.cli.output import Steps, json_option, put, say, settings, show, table
from gateway_plugin.paths import Layout
from gateway_plugin.plain import plain

if TYPE_CHECKING:
    from gateway_plugin.globus.endpoint.endpoints import Endpoints, EndpointStatus, Report
    from gateway_plugin.globus.endpoint.registrar_client import Pause

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_name = click.argument("name", default="gateway")


@click.group()
def endpoint() -> None:
    """Globus Compute endpoint: configure, start, stop, restart, status, list, delete."""


@endpoint.command()
@_name
@click.option("--url", help="The gateway's address. Default: of the one that runs from the state folder.")
@click.option(
    "--key-file",
    show_default="~/.config/gateway-plugin/endpoint.key",
    help="API key for it, 0600; '~' is the home of the local user that serves the caller.",
)
@click.option("--ca", type=_FILE, help="Authority of the gateway's certificate.")
@click.option("--input-folder", help="Folder whose JSONL files callers may name ('~' as above). Default: none.")
@click.option("--workers", show_default="4", type=click.IntRange(1, 64), help="Packs at a time and user.")
@click.option(
    "--heartbeat",
    "heartbeat_s",
    show_default="15",
    type=click.FloatRange(5, 60),
    help="Seconds between two signs of life.",
)
@click.option(
    "--multi-user", is_flag=True, default=None, help="Run as the local user that each caller maps to (needs root)."
)
@click.option("--identity-mapping", type=_FILE, help="Globus identity mapping, for --multi-user.")
@click.option("--contact", help="E-mail address for its users, for --multi-user.")
@click.option("--shared-folder", type=_FOLDER, help="Folder that every mapped user can read, for --multi-user.")
@click.option("--venv", type=_FOLDER, help="Environment with globus-compute-endpoint. Default: one is made.")
@click.option("--afresh", is_flag=True, help="Forget the options that it was configured with before.")
@click.option("--newest-only", is_flag=True, help="Allow older versions' functions no more; their callers are refused.")
@json_option
def configure(name: str, afresh: bool, newest_only: bool, **given: Any) -> None:
    """Make an endpoint that can do one thing: call this gateway. Prints its id and the function's.

    Run again, it changes the given options and keeps the others.
    """
    from gateway_plugin.globus.endpoint.store import Options

    whole = {key: said.absolute() if isinstance(said, Path) else said for key, said in given.items()}
    options = Options.model_validate(whole)
    with _working("configuring") as (endpoints, report):
        found = endpoints.configure(name, options, report, afresh=afresh, newest_only=newest_only)
    function = found.functions[-1]

    def human() -> None:
        put(f"endpoint  {found.id}  ({name})")
        put(f"function  {function.id}  (version {function.version}, SHA-256 {function.sha256[:16]})")
        for older in found.functions[:-1]:
            put(f"allowed   {older.id}  (version {older.version}; --newest-only ends that)")
        if found.state == "stopped":
            put(f"Next: put an API key for the gateway into its key file (0600), then 'gateway endpoint start {name}'.")
        else:
            where = "" if found.pid else f", on {found.host}"
            put(f"Next: it runs with what it was started with; 'gateway endpoint restart {name}'{where}.")

    show(found.document(), human)


def _add_start(verb: str, about: str, title: str, *, stop_first: bool) -> None:
    """``start``, or ``restart``."""

    @endpoint.command(verb, help=about)
    @_name
    @click.option("--timeout", default=60.0, show_default=True, help="Seconds to wait until it is online.")
    @json_option
    def run(name: str, timeout: float) -> None:
        with _working(title) as (endpoints, report):
            found = endpoints.start(name, report, timeout, stop_first=stop_first)
        show(found.document(), lambda: put(f"'{name}' is online: {found.id}"))


_add_start("start", "Start it and wait until it is online. Running again is safe.", "starting", stop_first=False)
_add_start("restart", "Stop it if it runs, and start it.", "restarting", stop_first=True)


@endpoint.command()
@_name
@click.option("--host-is-gone", is_flag=True, help="The machine it was started on will not be back: forget it there.")
@json_option
def stop(name: str, host_is_gone: bool) -> None:
    """Stop it, and remove its stored answers. Tasks that wait for it run when it is back."""
    stopped = _endpoints().stop(name, host_is_gone=host_is_gone)
    show({"name": name, "stopped": stopped}, lambda: put("stopped" if stopped else "it did not run"))


@endpoint.command()
@_name
@json_option
def status(name: str) -> None:
    """Show whether it is online, what it allows and what it did. Exit code 3 if it is not online."""
    found = _endpoints().ask_status(name)
    show(found.document(), lambda: _print_status(found))
    if found.state != "online":
        raise click.exceptions.Exit(3)


@endpoint.command("list")
@json_option
def list_endpoints() -> None:
    """The endpoints configured here."""
    all_of_them = _endpoints()
    found = [all_of_them.status(name) for name in all_of_them.names()]
    rows = [(one.name, one.id, "running" if one.pid else one.state, one.host, one.tasks_done) for one in found]
    document = [{"name": one.name, "id": one.id, "running": one.pid is not None, "host": one.host} for one in found]
    show(document, lambda: table(("endpoint", "id", "state", "machine", "tasks"), rows))


@endpoint.command()
@_name
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def delete(name: str, yes: bool) -> None:
    """Stop it, and remove it from Globus Compute and from here."""
    found = _endpoints().status(name)
    if not yes:
        click.confirm(
            plain(f"Delete the endpoint '{name}' ({found.id})? Callers will not find it any more"), abort=True
        )
    _endpoints().delete(name)
    show({"name": name, "deleted": True}, lambda: say(f"'{name}' is deleted"))


def _endpoints(pause: Pause = nullcontext) -> Endpoints:
    from gateway_plugin.globus.endpoint.endpoints import Endpoints

    return Endpoints(Layout.of(settings().state), pause)


@contextmanager
def _working(title: str) -> Iterator[tuple[Endpoints, Report]]:
    """The endpoints, with progress output; off the terminal while a user logs in there."""
    began = time.monotonic()
    rows: dict[str, str] = {}
    with Steps(title) as steps:

        def report(what: str, words: str) -> None:
            rows[what] = words
            steps.update([(part, text, "") for part, text in rows.items()], time.monotonic() - began)

        yield _endpoints(steps.pause), report


def _print_status(found: EndpointStatus) -> None:
    put(f"{found.name}  {found.id}: {found.state}{f' ({found.note})' if found.note else ''}")
    beat = "-" if found.heartbeat_age_s is None else f"{found.heartbeat_age_s:.0f} s ago"
    put(f"  process         {found.pid or '-'}{f' on {found.host}' if found.host else ''}")
    put(f"  last heartbeat  {beat}")
    put(f"  tasks done      {'-' if found.tasks_done is None else found.tasks_done}")
    for function in found.functions:
        put(f"  allowed         {function.id}  (infer {function.version}, SHA-256 {function.sha256[:16]})")
    if found.state == "stopped":
        put(f"Start it with 'gateway endpoint start {found.name}'.", err=True)
