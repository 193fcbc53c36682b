"""Discovery of the live parts of a gateway, among the processes and not in state files, which may be missing or stale.

Every part names a file or folder of its own gateway in its command line, so that another gateway's are never found.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from gateway_plugin.paths import Layout
from gateway_plugin.processes import Mark, arguments, descendants, find_own, listed_children

_HEAD_PROGRAMS = ("gcs_server", "raylet")
_ACTORS = (
    "ray::ServeController",
    *(f"ray::ServeReplica:gateway:{name}" for name in ("controller", "desk", "ingress")),
)
"""As Ray names their processes; an actor's current method may follow."""


def has_parts(programs: Collection[str]) -> bool:
    """Whether GCS and raylet are among the head's programs."""
    return {Path(program).name for program in programs} >= set(_HEAD_PROGRAMS)


def parts_run(head: Mark) -> bool:
    """Whether the head's GCS and raylet run: ``ray start --block``, whose children they are, keeps running if one ended
    on SIGTERM. Asked twice a second: login nodes have thousands of processes, and are looked through only in doubt."""
    return has_parts(_programs(listed_children(head.pid))) or has_parts(programs_below(head))


def has_application(programs: Collection[str]) -> bool:
    """Whether every process of the application is among the head's programs."""
    return all(any(program.startswith(actor) for program in programs) for actor in _ACTORS)


def programs_below(head: Mark) -> tuple[str, ...]:
    """The first arguments of the command lines below ``ray start``: paths, and Ray's names for actors."""
    return _programs(descendants(head.pid))


def _programs(marks: Iterable[Mark]) -> tuple[str, ...]:
    return tuple(line[0] for known in marks if (line := arguments(known.pid)))


def supervisors_of(layout: Layout) -> tuple[Mark, ...]:
    """Live supervisors of this state folder."""
    return _of_module("supervisor", layout)


def deployments_of(layout: Layout) -> tuple[Mark, ...]:
    """Live drivers that deploy the application."""
    return _of_module("deploy", layout)


def edges_of(layout: Layout) -> tuple[Mark, ...]:
    """Live HAProxy processes that serve this gateway's configuration, the youngest first.

    The youngest has the sockets: each new process takes over their names. One that only checks the file is left out.
    """
    return _youngest_first(find_own(("-db", "-f", str(layout.edge_config))))


def heads_of(layout: Layout) -> tuple[Mark, ...]:
    """Live ``ray start --head`` processes of this gateway, the youngest first: the tables belong to the youngest."""
    found = find_own((f"--temp-dir={layout.ray_temp}",))
    return _youngest_first(tuple(known for known in found if {"start", "--head"} <= set(arguments(known.pid))))


def _of_module(name: str, layout: Layout) -> tuple[Mark, ...]:
    return find_own(("-m", f"gateway_plugin.service.{name}", "--state", str(layout.state)))


def _youngest_first(marks: tuple[Mark, ...]) -> tuple[Mark, ...]:
    return tuple(sorted(marks, key=lambda known: (known.ticks, known.pid), reverse=True))
