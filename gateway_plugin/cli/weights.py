"""``gateway models fetch``, ``models weights`` and ``models prune``: weights from the hub on this machine's disk."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

from gateway_plugin.cli.output import duration, json_option, put, say, settings, show, table
from gateway_plugin.cli.recipes import recipe_of
from gateway_plugin.errors import ConfigError, NotFound, ServiceError

if TYPE_CHECKING:
    from gateway_plugin.catalog import Model
    from gateway_plugin.fetching import Progress
    from gateway_plugin.hub_inventory import Held

_RATE_OVER_S = 20.0
_LINE_EVERY_S = 30.0
_SITE = click.option(
    "--site", help="Name in parsl_configs, package.module, or a .py file. Default: as before, or local."
)
_MODELS = click.option("--models", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
                       help="A catalog. Default: the gateway's own, or models.yaml.")  # fmt: skip


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave files out, such as '*.md' or 'docs/'; repeatable. Second copies of weights are left out anyway.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Fetch only such files; repeatable. For one of several quantizations: '*Q4_K_M*'.",
)
@click.option(
    "--token-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The hub's token, mode 600. Default: HF_TOKEN, or the hub's own login.",
)
@_SITE
@_MODELS
@json_option
def fetch(
    names: tuple[str, ...], exclude: tuple[str, ...], include: tuple[str, ...], token_file: Path | None,
    site: str | None, file: Path | None,
) -> None:  # fmt: skip
    """Fetch weights from the hub into the site's folder, where engines find them.

    NAME is an entry of the catalog, a recipe, or org/name or org/name@REVISION. An interrupted fetch goes on where it
    stopped.
    """
    from gateway_plugin import hub
    from gateway_plugin.fetching import Fetched
    from gateway_plugin.fetching import fetch as run
    from gateway_plugin.weights import split_revision

    sources = _sources(names, _entries(file))
    cache, token = _cache(site), hub.token(token_file)
    done: list[dict[str, Any]] = []
    for source in sources:
        repository, revision = split_revision(source)
        began = time.monotonic()
        with Transfer(source) as transfer:
            found = _held_offline(source, cache) if not exclude and not include else None
            fetched: Fetched | None = None
            try:
                fetched = run(
                    repository, revision, cache, token=token, exclude=exclude, include=include, progress=transfer.update
                )
            except ServiceError as error:
                if found is None or "cannot be asked" not in error.message:
                    raise
                put(f"{error.message} What is there is whole: {found}", err=True)
        folder = found if fetched is None else fetched.folder
        seconds = time.monotonic() - began
        bytes_ = 0 if fetched is None else fetched.fetched_bytes
        done.append({
            "source": source, "revision": Path(str(folder)).name, "folder": str(folder), "fetched_bytes": bytes_,
            "total_bytes": None if fetched is None else fetched.total_bytes, "seconds": round(seconds, 2),
            "left_out": [] if fetched is None else list(fetched.left_out),
        })  # fmt: skip
        words = f"{size(bytes_)} in {duration(seconds)}" if bytes_ else "was there"
        say(f"{source}: {words}: {folder}")
        if fetched is not None and not revision:
            say(f"  revision {fetched.commit}: write '{repository}@{fetched.commit}' in the catalog to keep to it")
    if settings().json:
        show(done, lambda: None)


@click.command()
@_SITE
@_MODELS
@json_option
def weights(site: str | None, file: Path | None) -> None:
    """List fetched weights: sizes, last use, and the catalog entries that refer to them."""
    from gateway_plugin.hub_inventory import inventory

    cache = _cache(site)
    found = inventory(cache, _entries(file))
    rows = [(one.repository, one.commit[:12] or None, size(one.disk_bytes), _ago(one), _about(one)) for one in found]
    total = sum(one.disk_bytes for one in found)

    def human() -> None:
        if rows:
            table(("model", "revision", "size", "last use", "entries"), rows, whole=("model", "size"))
        put(f"{len(found)} in {cache}, {size(total)}")

    show({"folder": str(cache), "weights": [asdict(one) for one in found]}, human)


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--all", "all_programs", is_flag=True, help="Also what other programs and users fetched into the same folder."
)
@_SITE
@_MODELS
@json_option
def prune(dry_run: bool, yes: bool, all_programs: bool, site: str | None, file: Path | None) -> None:
    """Remove fetched weights that no catalog entry refers to."""
    from gateway_plugin.hub_inventory import inventory, remove, unused

    entries = _entries(file)
    if not entries:
        raise ConfigError("No catalog is known here, so all weights would seem unused: name one with --models FILE.")
    cache = _cache(site)
    found = unused(inventory(cache, entries), all_programs=all_programs)
    document: dict[str, Any] = {"folder": str(cache), "removed": [asdict(one) for one in found], "freed_bytes": 0}
    if not found:
        show(document, lambda: put(f"Every model in {cache} is referred to, or another program or user fetched it."))
        return
    if not settings().json:
        rows = [(one.repository, one.commit[:12] or None, size(one.disk_bytes), _ago(one)) for one in found]
        table(("model", "revision", "size", "last use"), rows, whole=("model", "size"))
    if dry_run:
        show({**document, "dry_run": True}, lambda: put("Nothing was removed (--dry-run)."))
        return
    if leaving := _leaving():
        raise ServiceError(
            f"Engines of {', '.join(leaving)} still drain, and may read weights that the catalog refers to no more: "
            "nothing was removed; run it again once 'gateway status' shows them no more."
        )
    if not yes:
        if settings().json:
            raise ConfigError("With --json, say --yes to remove them, or --dry-run.")
        click.confirm(f"Remove these from {cache}?", abort=True)
    document["freed_bytes"] = remove(cache, found)
    show(document, lambda: put(f"{size(document['freed_bytes'])} freed."))


class Transfer:
    """Progress of one fetch: a bar on a terminal, else a line for each tenth or half minute. Writes to stderr."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console

        self._name, self._clock, self._quiet = name, clock, settings().json
        self._console = Console(stderr=True, highlight=False)
        self._bar: Any = None
        self._task: Any = None
        self._seen: deque[tuple[float, int]] = deque()
        self._said: tuple[float, int] | None = None
        self._waits = False

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False), progress.BarColumn(),
                progress.TextColumn("{task.fields[words]}", markup=False), console=self._console, transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(_plain(self._name), total=None, words="asking the hub")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, progress: Progress) -> None:
        """Show how far it is."""
        now = self._clock()
        self._seen.append((now, progress.done_bytes))
        while now - self._seen[0][0] > _RATE_OVER_S:
            self._seen.popleft()
        if self._quiet:
            return
        words = transfer_words(progress, rate(self._seen))
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.done_bytes, total=progress.total_bytes, words=words)
            return
        tenth = 10 * progress.done_bytes // max(1, progress.total_bytes)
        last = self._said
        if last is None or last[1] != tenth or now - last[0] >= _LINE_EVERY_S or progress.waits != self._waits:
            self._said, self._waits = (now, tenth), progress.waits
            put(f"{self._name}: {words}", err=True)


def rate(seen: deque[tuple[float, int]]) -> float | None:
    """Bytes a second between the first and the last of (time, bytes); ``None``: not known yet. Pure."""
    seconds = seen[-1][0] - seen[0][0] if seen else 0.0
    return (seen[-1][1] - seen[0][1]) / seconds if seconds > 0 else None


def transfer_words(progress: Progress, bytes_s: float | None) -> str:
    """``3.2 of 14.9 GiB, 210 MiB/s, 57 s left``. Pure."""
    words = f"{size(progress.done_bytes)} of {size(progress.total_bytes)}"
    if progress.waits:
        return f"{words}; waits for another fetch of it"
    if bytes_s:
        words += f", {size(bytes_s)}/s, {duration((progress.total_bytes - progress.done_bytes) / bytes_s)} left"
    return words


def size(count: float) -> str:
    """``512 B``, ``3.2 MiB``, ``14.9 GiB``. Pure."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit != "MiB" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _plain(words: str) -> str:
    from gateway_plugin.plain import plain

    return plain(words)


def _ago(one: Held) -> str:
    return f"{duration(max(0.0, time.time() - one.last_used))} ago"


def _about(one: Held) -> str:
    """Who refers to it, and what is odd about it."""
    words = [", ".join(one.entries) or ("none" if one.by_gateway else "none; another program or user fetched it")]
    words += ["being fetched"] if one.fetching else [one.lacks] if one.lacks else []
    return "; ".join(words)


def _sources(names: tuple[str, ...], entries: tuple[Model, ...]) -> list[str]:
    """The hub sources of ``names``, each once. Raises ``NotFound`` or ``ConfigError``."""
    from gateway_plugin.hub import hub_source
    from gateway_plugin.weights import PREPARED, is_local

    found: dict[str, None] = {}
    for name in names:
        entry = next((entry for entry in entries if name in entry.names), None)
        recipe = recipe_of(name) if entry is None else None
        if entry is None and recipe is None and "/" not in name:
            known = ", ".join(entry.name for entry in entries if not is_local(entry.source)) or "none"
            raise NotFound(
                f"No catalog entry or recipe is called '{name}', and a hub name is org/name. Entries: {known}."
            )
        source = entry.source if entry is not None else recipe.source if recipe is not None else name
        if source.startswith(PREPARED):
            raise ConfigError(f"'{name}' is prepared, not fetched: run `gateway models prepare "
                              f"{source.removeprefix(PREPARED)}`")  # fmt: skip
        if is_local(source):
            raise ConfigError(f"'{name}' is the folder {source}: there is nothing to fetch.")
        found[hub_source(source)] = None
    return list(found)


def _entries(file: Path | None) -> tuple[Model, ...]:
    """The entries of every catalog that counts: the one in force, the file of the last start, and ``file``, or else
    ``models.yaml``."""
    from gateway_plugin.catalog import load_catalog
    from gateway_plugin.paths import Layout
    from gateway_plugin.service.active_catalog import in_force, own_catalog
    from gateway_plugin.service_state import read_record

    layout = Layout(settings().state)
    found: list[Model] = []
    if file is not None:
        found += load_catalog(file, unsized=True).models
    present = in_force(layout)
    found += present.models if present is not None else ()
    record = read_record(layout)
    if record is not None and record.catalog and Path(record.catalog).exists():
        found += load_catalog(Path(record.catalog), unsized=True).models
    if not found and file is None and Path("models.yaml").exists():
        found += load_catalog(own_catalog(), unsized=True).models
    return tuple(found)


def _leaving() -> tuple[str, ...]:
    """Models of engines that were started for an entry which is gone or has changed; of the gateway of this state
    folder, if it runs.

    Raises ``GatewayError``: it runs, and does not know its engines, or does not answer, or does so on another machine
    alone.
    """
    from gateway_plugin.client import Client
    from gateway_plugin.errors import GatewayUnreachable
    from gateway_plugin.paths import Layout
    from gateway_plugin.service.discovery import supervisors_of
    from gateway_plugin.service_state import record_here

    layout = Layout(settings().state)
    try:
        with Client(state=layout.state) as client:
            found = client.status()
    except GatewayUnreachable:
        if record_here(layout) is not None and supervisors_of(layout):
            raise
        return ()
    if not found.online:
        raise ServiceError("The gateway has just started and does not know its engines yet: run it again in a while.")
    known = {model.name for model in found.models}
    old = (one for one in found.engines if one["model"] not in known or one.get("stop_reason") == "catalog")
    return tuple(dict.fromkeys(str(one["model"]) for one in old))


def _cache(site: str | None) -> Path:
    from gateway_plugin.hub import cache_folder
    from gateway_plugin.paths import Layout
    from gateway_plugin.service_state import read_record
    from gateway_plugin.site import load_site

    record = read_record(Layout(settings().state))
    return cache_folder(
        load_site(site or (record.site_reference if record is not None else "") or "local").weights_folder
    )


def _held_offline(source: str, cache: Path) -> Path | None:
    """The whole snapshot of a pinned source that is there: good without the hub."""
    from gateway_plugin.hub_cache import COMMIT, lacks, snapshot
    from gateway_plugin.weights import split_revision

    repository, revision = split_revision(source)
    folder = snapshot(cache, repository, revision) if COMMIT.fullmatch(revision) else None
    return folder if folder is not None and not lacks(folder) else None
