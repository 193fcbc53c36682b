"""``gateway models plan`` and ``models add``: from a model's name to a catalog entry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway_plugin.cli.connection import connect, elsewhere
from gateway_plugin.cli.output import json_option, put, say, settings, show, table
from gateway_plugin.cli.recipes import recipe_of
from gateway_plugin.errors import GatewayError, GatewayUnreachable, NoRoom, NotFound
from gateway_plugin.paths import Layout

if TYPE_CHECKING:
    from gateway_plugin.recipes.recipes import Recipe
    from gateway_plugin.site import Site
    from gateway_plugin.sizing.past import Expected, Load
    from gateway_plugin.sizing.plan import Fit, Room, Source, Wish

GIB = 2**30
_COLUMNS = ("node type", "GPUs", "GiB", "weights", "cache", "engine", "context", "sequences")


def _asks(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed((
        click.argument("name", metavar="NAME"),
        click.option("--context", type=click.IntRange(1), help="Tokens, prompt and answer together. "
                     "Default: the model's own, at most 16384."),
        click.option("--concurrency", type=click.IntRange(1), help="Requests of that length at a time. Default: 4, "
                     "fewer where they do not fit."),
        click.option("--gpus", type=click.IntRange(1, 64), help="Default: the fewest that hold it."),
        click.option("--quantization", default="", help="Applied by vLLM as it loads: fp8, bitsandbytes, ..."),
        click.option("--site", help="Name in parsl_configs, package.module, or a .py file. Default: as before, or "
                     "local."),
        click.option("--token-file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
                     help="The hub's token, mode 600. Default: HF_TOKEN, or the hub's own login."),
    )):  # fmt: skip
        command = option(command)
    return command


@click.command()
@_asks
@json_option
def plan(name: str, site: str | None, token_file: Path | None, **asked: Any) -> None:
    """Work out whether and how a model fits on each node type.

    NAME is org/name or org/name@REVISION on the hub, a folder, prepared:NAME, or a recipe. Only its metadata is read.
    """
    source, wish, found, _, _ = _work_out(name, recipe_of(name), site, token_file, asked)
    loads = _past_loads()
    show(_document(source, wish, found, loads), lambda: _print(source, wish, found, loads))


@click.command()
@_asks
@click.option("--as", "alias", metavar="NAME", help="Its name in the catalog. Default: the last part of NAME.")
@click.option(
    "--task", type=click.Choice(("generate", "embed")), help="Default: the recipe's, else by its architecture."
)
@click.option("--models", "file", type=click.Path(dir_okay=False, path_type=Path),
              help="Catalog to add it to. Default: the gateway's own, or models.yaml.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the entry, change nothing.")
@json_option
def add(
    name: str, site: str | None, token_file: Path | None, alias: str | None, task: str | None, file: Path | None,
    dry_run: bool, **asked: Any,
) -> None:  # fmt: skip
    """Add a model to the catalog, its memory worked out, its revision pinned; NAME as for 'plan'.

    A recipe's options ('gateway models recipes') come with it. A running gateway takes the model at once if the
    catalog's other entries are what is in force there.
    """
    from gateway_plugin.service.active_catalog import own_catalog
    from gateway_plugin.sizing.entry import add_entry, entry_text

    recipe = recipe_of(name)
    source, wish, found, here, record_file = _work_out(name, recipe, site, token_file, asked)
    fit = next((one for one in found if one.engine is not None), None)
    if fit is None:
        why = "; ".join(f"{one.node_type}: {one.because}" for one in found)
        raise NoRoom(f"'{source.name}' fits on no node type of this site: {why}.")
    own = alias or (recipe.name if recipe else source.name.rstrip("/").removeprefix("prepared:").rsplit("/", 1)[-1])
    if recipe is None:
        text = entry_text(own, source, fit, wish, task or ("generate" if source.architecture.attention else "embed"))
    else:
        told = f"recipe of {', '.join(f'{one.url} ({one.date})' for one in recipe.documents)}" if recipe.args else ""
        text = entry_text(own, source, fit, wish, task or recipe.task, recipe.args, told)
    target = file or record_file or (own_catalog() if Path("models.yaml").exists() else Path("models.yaml"))
    document = {"model": own, "file": str(target), "entry": text, "in_force": False, "doubt": source.doubt or None}
    if dry_run:
        show(document, lambda: put(text.rstrip("\n")))
        return
    differs = _differs(target, here)
    add_entry(target, text)
    document["in_force"] = not differs and _apply(target, here)
    then = (
        "in force" if document["in_force"] else differs or f"no gateway runs: 'gateway up --models {target}' takes it"
    )
    show(document, lambda: put(text.rstrip("\n")))
    say(f"added to {target}, for {fit.node_type} nodes; {then}")
    if source.revision:
        say(f"its weights: gateway models fetch {own}")


def _work_out(
    name: str, recipe: Recipe | None, site: str | None, token_file: Path | None, asked: dict[str, Any]
) -> tuple[Source, Wish, tuple[Fit, ...], Site, Path | None]:
    """The model, what is asked of it, how it fits, the site, and the catalog of the gateway's last start."""
    from gateway_plugin.option_values import number_of, value_of
    from gateway_plugin.service_state import read_record
    from gateway_plugin.site import load_site
    from gateway_plugin.sizing.catalog_file import rooms_of
    from gateway_plugin.sizing.plan import Wish, fits
    from gateway_plugin.sizing.source import read_source

    record = read_record(Layout(settings().state))
    found = load_site(site or (record.site_reference if record is not None else "") or "local")
    try:
        source = read_source(recipe.source if recipe else name, token_file)
    except NotFound as error:
        if "/" in name:
            raise
        words = f"{error.message} It is no recipe either: 'gateway models recipes' lists them."
        raise NotFound(words) from None
    advised = number_of(value_of(recipe.args, "max-model-len")) if recipe else None
    wish = Wish(asked["context"] or advised, asked["concurrency"], asked["gpus"], asked["quantization"])
    catalog = Path(record.catalog) if record is not None and record.catalog else None
    return source, wish, fits(source, rooms_of(found), wish), found, catalog


def last_site() -> Site | None:
    """The site of this machine's gateway; ``None``: there is none, or another is spoken to."""
    from gateway_plugin.service_state import read_record
    from gateway_plugin.site import load_site

    record = read_record(Layout(settings().state)) if elsewhere() is None else None
    return load_site(record.site_reference) if record is not None and record.site_reference else None


def rooms_elsewhere(url: str) -> list[Room]:
    """The devices of the node types of the gateway at ``url`` (``GATEWAY_URL``), as it tells them."""
    from gateway_plugin.sizing.catalog_file import rooms_told

    with connect() as client:
        found = rooms_told(client.status().document.get("types", ()))
    if not found:
        put(f"{url} (GATEWAY_URL) does not tell its node types: memory is worked out for each model's whole context, "
            "whether it fits or not; 'memory_gib' says it", err=True)  # fmt: skip
    return found


def _differs(file: Path, site: Site) -> str:
    """Why the catalog ``file`` must not be put in force: it would replace other entries than those added to."""
    from gateway_plugin.service.active_catalog import in_force
    from gateway_plugin.sizing.catalog_file import read_catalog

    url = elsewhere()
    if url is not None:
        return f"not in force at {url} (GATEWAY_URL): 'gateway models apply {file}' puts this whole file in force"
    present = in_force(Layout(settings().state))
    if present is None or (file.exists() and read_catalog(file, site) == present):
        return ""
    return (
        f"not in force: the gateway's catalog is another one; 'gateway models apply {file}', or the next "
        f"'gateway up --models {file}', replaces it by this file"
    )


def _apply(file: Path, site: Site) -> bool:
    """Put the catalog in force; ``False``: no gateway runs."""
    from gateway_plugin.catalog import catalog_document
    from gateway_plugin.sizing.catalog_file import read_catalog

    try:
        with connect() as client:
            client.apply(catalog_document(read_catalog(file, site)))
    except GatewayUnreachable:
        return False
    except GatewayError as error:
        put(f"added to {file}, but not in force; 'gateway models apply {file}' tries again", err=True)
        raise error from None
    return True


def _past_loads() -> tuple[Load, ...]:
    """Loads that the controller of this machine's gateway noted."""
    from gateway_plugin.files import Garbled, read_object
    from gateway_plugin.sizing.past import loads_in

    if elsewhere() is not None:
        return ()
    try:
        return loads_in(read_object(Layout(settings().state).controller_files.cards) or {})
    except (OSError, Garbled):
        return ()


def _load_of(source: Source, fit: Fit, loads: tuple[Load, ...]) -> Expected | None:
    from gateway_plugin.sizing.past import expected

    return expected(source.name, fit.engine, loads) if fit.engine is not None else None


def _document(source: Source, wish: Wish, found: tuple[Fit, ...], loads: tuple[Load, ...]) -> dict[str, Any]:
    from gateway_plugin.sizing.estimate import cache_bytes
    from gateway_plugin.sizing.plan import weights_of

    architecture = source.architecture
    return {
        "model": source.name,
        "revision": source.revision or None,
        "architecture": architecture.name,
        "parameters": architecture.parameters,
        "dtype": architecture.dtype,
        "quantization": wish.quantization or architecture.quantization or None,
        "license": source.license or None,
        "gated": source.gated,
        "context": architecture.context,
        "weights_bytes": weights_of(source, wish),
        "cache_bytes_per_token": cache_bytes(architecture, 1, 1, 1),
        "doubt": source.doubt or None,
        "fits": [
            {
                "node_type": fit.node_type,
                "fits": fit.engine is not None,
                "gpus": fit.engine.gpus if fit.engine else None,
                "memory_gib": fit.engine.gib if fit.engine else None,
                "context": fit.engine.context if fit.engine else None,
                "sequences": fit.engine.sequences if fit.engine else None,
                "cache_tokens": fit.engine.context * fit.engine.sequences if fit.engine else None,
                "longest_context": fit.longest,
                "load_s": load.seconds if (load := _load_of(source, fit, loads)) else None,
                "load_like": list(load.like) if load else [],
                "reason": fit.because or None,
            }
            for fit in found
        ],
    }


def _print(source: Source, wish: Wish, found: tuple[Fit, ...], loads: tuple[Load, ...]) -> None:
    from gateway_plugin.sizing.plan import parameters_words

    document = _document(source, wish, found, loads)
    facts = [
        ("architecture", document["architecture"]),
        ("parameters", parameters_words(source.architecture).removesuffix(" parameters")),
        ("weights", f"{document['weights_bytes'] / GIB:.1f} GiB, {document['quantization'] or document['dtype']}"),
        ("cache", f"{document['cache_bytes_per_token'] / 1024:.0f} KiB a token" if source.architecture.attention
         else "none"),
        ("context", f"{document['context']} tokens"),
        ("revision", document["revision"]),
        ("licence", document["license"]),
        ("gated", "yes: its licence must be accepted on the hub" if source.gated else None),
        ("doubt", document["doubt"]),
    ]  # fmt: skip
    table(("", source.name), [fact for fact in facts if fact[1]])
    rows = [
        (fit.node_type, one.gpus or "", f"{one.gib:g}", *(f"{part / GIB:.1f}" for part in
         (one.weights, one.cache, one.buffers)), one.context, one.sequences)
        for fit in found if (one := fit.engine) is not None
    ]  # fmt: skip
    if rows:
        table(_COLUMNS, rows)
    for fit in found:
        if fit.engine is None:
            put(f"{fit.node_type}: no: {fit.because}")
        else:
            cut = f"{fit.because}; " if fit.because else ""
            load = _load_of(source, fit, loads)
            soon = f"; {load.words}" if load else ""
            put(f"{fit.node_type}: {cut}one sequence alone may have {fit.longest} tokens{soon}")
