"""``gateway endpoint``: the Globus Compute endpoint that lets remote workflows call this gateway."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gateway_plugin.cli.output import Steps, json_option, say, settings, show, table
from gateway_plugin.errors import ConfigError
from gateway_plugin.layout import Layout

if TYPE_CHECKING:
    from gateway_plugin.compute.endpoint import Endpoints, EndpointStatus, Report

_name = click.argument("name", default="gateway")


@click.group()
def endpoint() -> None:
    """Globus Compute endpoint: configure, start, stop, restart, status, list, delete."""


@endpoint.command()
@_name
@click.option("--url", help="The gateway's address. Default: of the one that runs from the state folder.")
@click.option(
    "--key-file",
    default="~/.config/gateway-plugin/endpoint.key",
    show_default=True,
    help="API key for it, 0600; '~' is the home of the local user that serves the caller.",
)
@click.option("--ca", type=click.Path(exists=True, dir_okay=False), help="Authority of the gateway's certificate.")
@click.option("--input-folder", help="Folder whose JSONL files callers may name ('~' as above). Default: none.")
@click.option("--workers", default=4, show_default=True, type=click.IntRange(1, 64), help="Packs at a time and user.")
@click.option("--heartbeat", default=15.0, show_default=True, type=click.FloatRange(5, 60), help="Seconds between.")
@click.option("--multi-user", is_flag=True, help="Run as the local user that each caller maps to (needs root).")
@click.option(
    "--identity-mapping",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Globus identity mapping, for --multi-user.",
)
@click.option("--contact", help="E-mail address for its users, for --multi-user.")
@click.option(
    "--shared-folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that every mapped user can read, for --multi-user.",
)
@click.option(
    "--venv",
    type=click.Path(file_okay=False, path_type=Path),
    help="Environment with globus-compute-endpoint. Default: one is made.",
)
@json_option  # fmt: skip
def configure(
    name: str, url: str | None, key_file: str, ca: str | None, input_folder: str | None, workers: int,
    heartbeat: float, multi_user: bool, identity_mapping: Path | None, contact: str | None,
    shared_folder: Path | None, venv: Path | None,
) -> None:  # fmt: skip
    """Make an endpoint that can do one thing: ask this gateway. Prints its id and the function's."""
    from gateway_plugin.compute.config import EndpointSettings
    from gateway_plugin.locate import find_gateway

    if multi_user != (identity_mapping is not None):
        raise ConfigError("--multi-user and --identity-mapping FILE go together.")
    layout = Layout(settings().state)
    made = EndpointSettings(
        name=name,
        url=url.rstrip("/").removesuffix("/v1") if url else find_gateway(state=settings().state)[0],
        key_file=key_file,
        answers=_answers_prefix(layout, name),
        input_folder=input_folder,
        ca=str(Path(ca).absolute()) if ca else None,
        workers=workers,
        heartbeat_s=heartbeat,
        identity_mapping=identity_mapping.absolute() if identity_mapping else None,
        contact=contact,
    )
    with _steps("configuring") as report:
        found = _endpoints().configure(made, report, venv=venv, shared=shared_folder)
    function = found.functions[-1]

    def human() -> None:
        click.echo(f"endpoint  {found.id}  ({name})")
        click.echo(f"function  {function.id}  (version {function.version}, SHA-256 {function.sha256[:16]})")
        click.echo(
            f"Next: put an API key for the gateway into {key_file} (0600), then 'gateway endpoint start {name}'."
        )

    show(found.document(), human)


@endpoint.command()
@_name
@click.option("--timeout", default=60.0, show_default=True, help="Seconds to wait until it is online.")
@json_option
def start(name: str, timeout: float) -> None:
    """Start it and wait until it is online. Running again is safe."""
    with _steps("starting") as report:
        found = _endpoints().start(name, report, timeout)
    show(found.document(), lambda: click.echo(f"'{name}' is online: {found.id}"))


@endpoint.command()
@_name
@json_option
def stop(name: str) -> None:
    """End it. Tasks that wait for it run when it is back."""
    stopped = _endpoints().stop(name)
    show({"name": name, "stopped": stopped}, lambda: click.echo("stopped" if stopped else "it did not run"))


@endpoint.command()
@_name
@click.option("--timeout", default=60.0, show_default=True, help="Seconds to wait until it is online.")
@json_option
def restart(name: str, timeout: float) -> None:
    """Stop it if it runs, and start it."""
    with _steps("restarting") as report:
        report("endpoint", "stopping")
        _endpoints().stop(name)
        found = _endpoints().start(name, report, timeout)
    show(found.document(), lambda: click.echo(f"'{name}' is online: {found.id}"))


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
    rows = [(one.name, one.id, "running" if one.pid else "stopped", one.tasks_done) for one in found]
    document = [{"name": one.name, "id": one.id, "running": one.pid is not None} for one in found]
    show(document, lambda: table(("endpoint", "id", "state", "tasks"), rows))


@endpoint.command()
@_name
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def delete(name: str, yes: bool) -> None:
    """Stop it, and remove it from Globus Compute and from here."""
    found = _endpoints().status(name)
    if not yes:
        click.confirm(f"Delete the endpoint '{name}' ({found.id})? Callers will not find it any more", abort=True)
    _endpoints().delete(name)
    show({"name": name, "deleted": True}, lambda: say(f"'{name}' is deleted"))


def _endpoints() -> Endpoints:
    from gateway_plugin.compute.endpoint import Endpoints

    return Endpoints(Layout(settings().state))


def _answers_prefix(layout: Layout, name: str) -> str:
    """On this node's own disk, told apart from another gateway's."""
    digest = hashlib.sha256(f"{layout.state}:{name}".encode()).hexdigest()[:8]
    return str(layout.run.parent / f"gwe-{os.getuid()}-{digest}")


@contextmanager
def _steps(title: str) -> Iterator[Report]:
    began = time.monotonic()
    rows: dict[str, str] = {}
    with Steps(title) as steps:

        def report(what: str, words: str) -> None:
            rows[what] = words
            steps.update([(part, text, "") for part, text in rows.items()], time.monotonic() - began)

        yield report


def _print_status(found: EndpointStatus) -> None:
    click.echo(f"{found.name}  {found.id}: {found.state}{f' ({found.note})' if found.note else ''}")
    beat = "-" if found.heartbeat_age_s is None else f"{found.heartbeat_age_s:.0f} s ago"
    click.echo(f"  process         {found.pid or '-'}")
    click.echo(f"  last heartbeat  {beat}")
    click.echo(f"  tasks done      {found.tasks_done}")
    for function in found.functions:
        click.echo(f"  allowed         {function.id}  (infer {function.version}, SHA-256 {function.sha256[:16]})")
    if found.state == "stopped":
        click.echo(f"Start it with 'gateway endpoint start {found.name}'.", err=True)
