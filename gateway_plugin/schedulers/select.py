"""The scheduler of each node type, chosen by its Parsl provider."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from parsl.providers import LocalProvider, PBSProProvider, SlurmProvider

from gateway_plugin.errors import ConfigError, GatewayError
from gateway_plugin.paths import Layout, private_folder
from gateway_plugin.schedulers.base import Scheduler, script_folder, shared_script_place, walltime_s
from gateway_plugin.schedulers.local import LocalScheduler
from gateway_plugin.schedulers.pbs import PbsScheduler
from gateway_plugin.schedulers.queue import QueueScheduler
from gateway_plugin.schedulers.queue_reader import QueueReader
from gateway_plugin.schedulers.slurm import SlurmScheduler
from gateway_plugin.site import NodeType, what_went_wrong

_VERBS = ("submit", "status", "find", "cancel", "in_doubt_s")


def schedulers_for(node_types: Iterable[NodeType], layout: Layout) -> dict[str, Scheduler]:
    """The scheduler of each node type, by its name. Node types on one cluster share one reader of its queue.

    Raises ``ConfigError``.
    """
    readers: dict[tuple[type[QueueScheduler], str | None], QueueReader] = {}
    found: dict[str, Scheduler] = {}
    for node_type in node_types:
        found[node_type.name] = scheduler = scheduler_for(node_type.provider, layout)
        if isinstance(scheduler, QueueScheduler):
            cluster = type(scheduler), getattr(node_type.provider, "clusters", None)
            scheduler.reader = readers.setdefault(cluster, scheduler.reader)
    return found


def scheduler_for(provider: Any, layout: Layout) -> Scheduler:
    """The scheduler of one provider. Raises ``ConfigError`` if its jobs could not be submitted or found again.

    (1) A site's own provider may supply one, with a method ``gateway_jobs(layout) -> Scheduler``. (2) A batch queue.
    (3) This machine.
    """
    demand_known(provider)
    if callable(bring := getattr(provider, "gateway_jobs", None)):  # (1)
        return _brought(type(provider).__name__, bring, layout)
    if is_queue(provider):  # (2)
        return queue_scheduler(provider, private_folder(shared_script_place(layout)), layout)
    return LocalScheduler(provider, script_folder(layout), layout)  # (3)


def demand_known(provider: Any) -> None:
    """Raises ``ConfigError`` for a provider without a scheduler here, or with an invalid walltime."""
    walltime_s(provider)
    own = callable(getattr(provider, "gateway_jobs", None))
    if not (own or is_queue(provider) or isinstance(provider, LocalProvider)):
        raise ConfigError(
            f"{type(provider).__name__}: blocks of this Parsl provider cannot be found again after a restart; "
            "expected a LocalProvider, a SlurmProvider or a PBSProProvider"
        )


def _brought(provider: str, bring: Callable[[Layout], Any], layout: Layout) -> Scheduler:
    """The scheduler that a site's own provider supplies. Any exception of that code is an error in the site."""
    try:
        scheduler: Scheduler = bring(layout)
    except GatewayError:
        raise
    except Exception as error:  # noqa: BLE001
        raise ConfigError(f"{provider}.gateway_jobs: {what_went_wrong(error)}") from None
    missing = [verb for verb in _VERBS if not hasattr(scheduler, verb)]
    if missing:
        raise ConfigError(
            f"{provider}.gateway_jobs gave {type(scheduler).__name__} without {', '.join(missing)}; "
            "expected a gateway_plugin.schedulers.base.Scheduler"
        )
    return scheduler


def is_queue(provider: Any) -> bool:
    """Whether this is a Parsl provider of a supported batch queue."""
    return isinstance(provider, (SlurmProvider, PBSProProvider))


def queue_scheduler(provider: Any, scripts: Path, layout: Layout) -> QueueScheduler:
    """The scheduler of a queue's provider, with its scripts in ``scripts``. Raises ``ConfigError``."""
    kind = SlurmScheduler if isinstance(provider, SlurmProvider) else PbsScheduler
    return kind(provider, scripts, layout)
