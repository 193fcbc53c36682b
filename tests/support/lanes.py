"""Two pytest workers side by side (``make test``): which of them runs which files.

Many tests wait, for queues, walltimes and clocks, and many compute. All files are one list; one worker takes files from
its beginning, the other from its end, and they meet in the middle. So the machine computes while tests wait, one
virtual Slurm runs at a time, and neither worker is idle before the other is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

ORDER = (
    *("slurm/", "contract/test_provider", "globus/", "hostile/", "pbs/", "security/test_neighbours", "security/"),
    "unit/",
    *("contract/", "integration/", "live/"),
)
"""How paths below ``tests/`` begin: those with Slurm, which wait most, at one end, whole gateways and real models at
the other; the small ones lie between them, where the workers meet."""
TOGETHER = ("globus/", "hostile/", "integration/lifecycle/", "security/", "slurm/served/")
"""Folders of which one worker runs all files: they share what takes long to start."""


def folder_of(nodeid: str) -> str:
    """The top folder of a test id: ``slurm`` of ``tests/slurm/test_jobs.py::test_x``."""
    return nodeid.split("/")[1] if nodeid.startswith("tests/") else ""


def unit_of(nodeid: str) -> str:
    """What one worker runs in one go: a folder of ``TOGETHER``, or a file."""
    path = nodeid.split("::")[0]
    return next((folder for folder in TOGETHER if path.startswith(f"tests/{folder}")), path)


def ordered(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """In the order of ``ORDER``, otherwise as collected."""

    def place(item: pytest.Item) -> int:
        path = item.nodeid.removeprefix("tests/")
        return next((place for place, start in enumerate(ORDER) if path.startswith(start)), len(ORDER))

    return sorted(items, key=place)


def scheduler(config: pytest.Config, log: Any) -> Any:
    """xdist's scheduler of whole files, whose second worker takes them from the end of the list."""
    from xdist.scheduler import LoadScopeScheduling  # only where there are workers

    class FromBothEnds(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

        def _assign_work_unit(self, node: Any) -> None:
            if node.gateway.id == "gw1":
                self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
            super()._assign_work_unit(node)

    config.option.loadscopereorder = False  # as collected
    return FromBothEnds(config, log)
