"""A queue's attributes as PBS Pro reports them, and the checks of a site's node types against them. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gateway_plugin.errors import ConfigError
from gateway_plugin.schedulers.base import walltime_s
from gateway_plugin.schedulers.job_options import pbs_asked
from gateway_plugin.schedulers.pbs_cli import duration_s
from gateway_plugin.service.checks import Check, Verdict
from gateway_plugin.site import NodeType

NEEDED = ("qsub", "qstat", "qdel", "qselect")
"""Commands that blocks require."""


def queue_argv(queue: str) -> tuple[str, ...]:
    """The command that shows all attributes of a queue."""
    return ("qstat", "-Q", "-f", "-F", "json", queue)


def parse_queue(text: str, queue: str) -> Mapping[str, Any] | None:
    """The queue's attributes in the output of ``queue_argv``; ``None`` if there are none or they cannot be parsed."""
    try:
        document = json.loads(text, strict=False)
    except ValueError:
        return None
    found = document.get("Queue", {}).get(queue) if isinstance(document, dict) else None
    return found if isinstance(found, dict) else None


def judged(node_type: NodeType, queue: Mapping[str, Any]) -> tuple[Check, ...]:
    """Every check of one node type that a queue's attributes allow."""
    provider, asked_for = node_type.provider, queue_of(node_type.provider)
    name = f"{node_type.name}: queue"
    closed = [word for word in ("enabled", "started") if str(queue.get(word, "True")) != "True"]
    checks = [
        Check(name, Verdict.WARN, f"{asked_for} is not {' and not '.join(closed)}", "ask the site, or wait")
        if closed
        else Check(name, Verdict.OK, f"{asked_for} takes jobs")
    ]
    most, least = queue.get("resources_max", {}), queue.get("resources_min", {})
    if (nodes := _number(least.get("nodect"))) > 1:
        found = f"{asked_for} takes jobs of {nodes} nodes and more, and a block is one node"
        checks[0] = Check(name, Verdict.FAIL, found, "queue= in the site file: choose another", configuration=True)
    checks.append(_walltime(node_type, least, most))
    account = provider.account or pbs_asked(provider).value("A")
    words = f"{account or 'your default project'}, GPUs and cores: PBS does not report these before a job runs"
    checks.append(Check(f"{node_type.name}: account", Verdict.WARN, words, "'gateway doctor --submit' tries it"))
    return tuple(checks)


def queue_of(provider: Any) -> str | None:
    """The queue of its jobs: the field takes precedence over ``scheduler_options``. ``None``: the default queue."""
    return provider.queue or pbs_asked(provider).value("q")


def _walltime(node_type: NodeType, least: Mapping[str, Any], most: Mapping[str, Any]) -> Check:
    provider, name = node_type.provider, f"{node_type.name}: walltime"
    try:
        walltime_s(provider)
    except ConfigError as error:
        return Check(name, Verdict.FAIL, error.message, "walltime= in the site file", configuration=True)
    asked_s = duration_s(provider.walltime) or 0.0
    queue = queue_of(provider)
    limits = (duration_s(least.get("walltime")) or 0.0, duration_s(most.get("walltime")) or float("inf"))
    if limits[0] <= asked_s <= limits[1]:
        return Check(name, Verdict.OK, f"{provider.walltime}; {queue} allows {most.get('walltime', 'any')}")
    found = f"{provider.walltime}; {queue} takes {least.get('walltime', 'any')} to {most.get('walltime')}"
    return Check(name, Verdict.FAIL, found, "walltime= in the site file", configuration=True)


def _number(text: object) -> int:
    return int(str(text)) if str(text).isdigit() else 0
