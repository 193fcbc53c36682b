"""Whether the catalog's models can ever fit on the site's nodes. Pure."""

from __future__ import annotations

from gateway_plugin.catalog import Catalog, Model
from gateway_plugin.service.checks import Check, Verdict
from gateway_plugin.site import NodeType, Site


def fit(site: Site, catalog: Catalog) -> tuple[Check, ...]:
    """Every model fits on an empty node of some type, and all pinned ones together into the largest possible set of
    nodes.

    The rule for one model is that of the controller's placement (``serve.core.room.holds``, in whole MiB). Pins are
    only added up: an excess proves that they do not fit; a sum within the limit does not prove that they do.
    """
    advice = "lower its memory_gib or gpus in the catalog if it needs less, or give a node type more in the site file"
    checks = [
        Check(f"room for {model.name}", Verdict.FAIL, _too_large(site, model), advice, configuration=True)
        for model in catalog.models
        if not any(node_type.max_blocks and _holds(node_type, model) for node_type in site.node_types)
    ]
    if catalog.models and not checks:
        checks.append(Check("room for models", Verdict.OK, "each of them fits on an empty node"))
    return (*checks, *_pins(site, catalog))


def _holds(node_type: NodeType, model: Model) -> bool:
    if model.gpus:
        return node_type.gpus >= model.gpus and int(node_type.gpu_memory_gib * 1024) >= model.memory_mib
    return int(node_type.engine_memory_gib * 1024) >= model.memory_mib


def _too_large(site: Site, model: Model) -> str:
    if model.gpus:
        wanted = f"{model.gpus} GPUs with {model.memory_gib:g} GiB each"
        held = (f"{kind.gpus} x {kind.gpu_memory_gib:g} GiB" if kind.gpus else "no GPU" for kind in site.node_types)
    else:
        wanted = f"{model.memory_gib:g} GiB of engine memory"
        held = (f"{kind.engine_memory_gib:g} GiB" for kind in site.node_types)
    kinds = ", ".join(
        f"{kind.name} {what}" + ("" if kind.max_blocks else " (max_blocks is 0)")
        for kind, what in zip(site.node_types, held, strict=True)
    )
    return f"it needs {wanted}, and a node of this site has: {kinds}"


def _pins(site: Site, catalog: Catalog) -> tuple[Check, ...]:
    """The sum of the host and GPU memory of pinned models, against all node types at ``max_blocks``."""
    pinned = [model for model in catalog.models if model.pinned]
    sums = (
        (
            "engine memory",
            sum(model.memory_mib for model in pinned if not model.gpus),
            sum(int(kind.engine_memory_gib * 1024) * kind.max_blocks for kind in site.node_types),
        ),
        (
            "GPU memory",
            sum(model.memory_mib * model.gpus for model in pinned),
            sum(int(kind.gpu_memory_gib * 1024) * kind.gpus * kind.max_blocks for kind in site.node_types),
        ),
    )
    advice = "pin fewer models, or raise max_blocks or the nodes' memory in the site file"
    names = ", ".join(model.name for model in pinned)
    return tuple(
        Check(
            "room for pins",
            Verdict.WARN,
            f"pinned models ({names}) need {need / 1024:.1f} GiB of {what} together, the site's nodes have "
            f"{there / 1024:.1f}: not all of them will be loaded",
            advice,
        )
        for what, need, there in sums
        if need > there
    )
