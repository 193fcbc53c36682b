"""A catalog file as it is put in force: with the memory of every model (``memory_gib: auto``) worked out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gateway_plugin.catalog import Catalog, Model, load_catalog
from gateway_plugin.errors import ConfigError, GatewayError
from gateway_plugin.site import Site
from gateway_plugin.sizing.auto import Unsized, refusal, sized
from gateway_plugin.sizing.estimate import MIB
from gateway_plugin.sizing.kept import Kept
from gateway_plugin.sizing.plan import GIB, Room
from gateway_plugin.weights import is_local

_AT_A_TIME = 8
"""Models whose sizes are asked of the hub side by side."""


def rooms_of(site: Site | None) -> list[Room]:
    """The devices of the site's node types; ``[]``: the site is not known."""
    return [
        Room(one.name, one.gpus, int(one.gpu_memory_gib * GIB), int(one.engine_memory_gib * GIB))
        for one in (site.node_types if site is not None else ())
    ]


def rooms_told(types: Iterable[Mapping[str, Any]]) -> list[Room]:
    """The devices of the node types in a gateway's status; ``[]``: an earlier version's, which does not tell them."""
    told = [(str(one["type"]), one["gpu_mib"], int(one["host_mib"])) for one in types if "gpu_mib" in one]
    return [Room(name, len(gpus), min(gpus, default=0) * MIB, host * MIB) for name, gpus, host in told]


def read_catalog(
    file: Path,
    site: Site | None,
    kept: Kept | None = None,
    report: Callable[[int], None] = lambda models: None,
    rooms: Callable[[], Sequence[Room]] | None = None,
) -> Catalog:
    """The catalog in ``file``, for ``site``. Metadata of models on the hub is asked for, or read from the cache.

    Args:
        rooms: called for the devices of the node types where some model's memory is to be worked out; default: those
            of ``site``.
        report: called with their number before models are looked up on the hub, which may take a while.

    Raises:
        ConfigError: it is not valid, or the memory of a model cannot be worked out: the message names the model.
    """
    catalog = load_catalog(file, unsized=True)
    waiting = [model for model in catalog.models if not model.memory_gib]
    if not waiting:
        return catalog
    kept = kept or Kept(weights_folder=site.weights_folder if site is not None else None)
    devices = rooms_of(site) if rooms is None else rooms()
    if asked := sum(not is_local(model.source) for model in waiting):
        report(asked)

    def worked_out(model: Model) -> Model:
        try:
            if not (why := refusal(model)):  # before anybody is asked
                return sized(model, kept.source(model.source), devices).applied(model)
        except Unsized as missing:
            why = str(missing)
        except GatewayError as error:
            why = error.message.rstrip(".")
        where = f"{file}: models.{model.name}.memory_gib"
        raise ConfigError(f"{where}: cannot be worked out: {why}; say it yourself, in GiB")

    with ThreadPoolExecutor(_AT_A_TIME) as threads:
        done = dict(zip((model.name for model in waiting), threads.map(worked_out, waiting), strict=True))
    return catalog.model_copy(update={"models": tuple(done.get(model.name, model) for model in catalog.models)})
