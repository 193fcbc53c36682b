"""``gateway models``: prepare weights, show models, load and unload them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from gateway_plugin.api_types import MEASURED, ModelInfo
from gateway_plugin.cli.connection import connect, elsewhere
from gateway_plugin.cli.output import Steps, duration, json_option, outlook, put, say, show, table
from gateway_plugin.cli.recipes import recipes
from gateway_plugin.cli.sizing import add, plan
from gateway_plugin.cli.weights import fetch, prune, weights

_COLUMNS = ("model", "task", "state", "pinned", "in flight", "waiting", "ready in", "nodes", "aliases", "reason")


@click.group()
def models() -> None:
    """Models: recipes, plan, add, fetch, weights, prune, prepare, list, show, why, load, unload, pin, unpin, apply."""


models.add_command(recipes)
models.add_command(plan)
models.add_command(add)
for command in (fetch, weights, prune):
    models.add_command(command)


@models.command()
@click.argument("names", nargs=-1)
@json_option
def prepare(names: tuple[str, ...]) -> None:
    """Build the weights of NAMES (default: all with a recipe) into the cache folder, once."""
    from gateway_plugin import weights as prepared

    began = time.monotonic()
    rows: dict[str, tuple[str, str]] = {}
    with Steps("preparing") as steps:

        def report(step: prepared.Progress) -> None:
            rows[step.name] = (step.step, f"{100 * step.fraction:.0f} %")
            steps.update([(name, *row) for name, row in rows.items()], time.monotonic() - began)

        folders = prepared.prepare(names or None, progress=report)
    document = {name: str(folder) for name, folder in folders.items()}
    show(document, lambda: table(("model", "folder"), document.items()))


@models.command("list")
@json_option
def list_models() -> None:
    """Every model of the catalog and its state."""
    with connect() as client:
        found = client.models()
    rows = [
        (m.name, m.task, m.state, "yes" if m.pinned else "", m.in_flight, m.waiting, duration(m.eta_s),
         " ".join(m.nodes), " ".join((*m.aliases, *m.adapters)), m.reason)
        for m in found
    ]  # fmt: skip
    show([asdict(model) for model in found], lambda: table(_COLUMNS, rows))


@models.command("show")
@click.argument("name")
@json_option
def show_model(name: str) -> None:
    """One model, by name or alias."""
    with connect() as client:
        document = asdict(client.model(name))
    rows = [(key, value) for key, value in document.items() if value is not None or key not in MEASURED]
    show(document, lambda: table(("", name), rows))


@models.command()
@click.argument("name", metavar="MODEL")
@json_option
def why(name: str) -> None:
    """Why a model is loaded, asleep, loading, evicted or waiting, and what would change it."""
    with connect() as client:
        found = client.why(name)

    def human() -> None:
        put(f"{found.model} is {found.state}.")
        for sentence in found.why:
            put(sentence)
        for title, lines in (
            ("What would change it:", found.would_change),
            ("Last decisions:", [_decision(one) for one in found.decisions]),
        ):
            if lines:
                put("\n".join(["", title, *(f"  {line}" for line in lines)]))

    show(asdict(found), human)


def _decision(one: Mapping[str, Any]) -> str:
    engine = f" ({one['engine']})" if one.get("engine") else ""
    other = f" for {one['other']}" if one.get("other") else ""
    return f"{duration(one['ago_s'])} ago: {one['action']} {one['model']}{engine}{other}: {one['because']}"


@models.command()
@click.argument("name")
@click.option("--wait", is_flag=True, help="Wait until it is ready.")
@click.option("--timeout", default=1800.0, show_default=True, help="Seconds to wait with --wait.")
@json_option
def load(name: str, wait: bool, timeout: float) -> None:
    """Load a model."""
    began = time.monotonic()
    with connect() as client, Steps("loading") as steps:

        def report(found: ModelInfo) -> None:
            steps.update([(found.name, found.state, outlook(found))], time.monotonic() - began)

        client.load(name)
        found = client.wait_until_ready(name, timeout, report=report) if wait else client.model(name)
    seconds = time.monotonic() - began
    words = f"{found.name} is ready after {seconds:.1f} s" if found.ready else f"{found.name}: {found.state}"
    show({"model": found.name, "state": found.state, "seconds": round(seconds, 2)}, lambda: put(words))


def _add_verb(verb: str, about: str, words: str) -> None:
    """A command with the name of the client's method that it calls."""

    @models.command(verb, help=about)
    @click.argument("name")
    @json_option
    def run(name: str) -> None:
        with connect() as client:
            getattr(client, verb)(name)
        show({"model": name, "done": verb}, lambda: say(f"{name} {words}"))


_add_verb("unload", "Drain a model's engines and stop them.", "is being unloaded")
_add_verb("pin", "Load a model and never evict it.", "is pinned")
_add_verb("unpin", "Let a model be evicted again.", "may be evicted")


@models.command()
@click.argument("catalog", type=click.Path(dir_okay=False, path_type=Path))
@json_option
def apply(catalog: Path) -> None:
    """Put another catalog in force while the gateway runs."""
    from gateway_plugin.catalog import catalog_document
    from gateway_plugin.cli.sizing import last_site, rooms_elsewhere
    from gateway_plugin.sizing.catalog_file import read_catalog

    url = elsewhere()
    rooms = None if url is None else partial(rooms_elsewhere, url)
    wanted = read_catalog(catalog, last_site(), report=lambda models: say(f"sizing {models} models"), rooms=rooms)
    with connect() as client:
        client.apply(catalog_document(wanted))
    names = [model.name for model in wanted.models]
    show({"models": names}, lambda: say(f"in force: {', '.join(names)}"))
