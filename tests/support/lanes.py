"""Two pytest workers side by side (``make test``): which of them runs which files.

Many tests wait, for queues, walltimes and clocks, and many compute. One list of files, ordered from the former to the
latter; one worker takes files from its beginning, the other from its end, and they meet in the middle. So the machine
computes while tests wait, most of the time one virtual Slurm runs, and neither worker is idle before the other is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

ORDER = ("slurm", "globus", "hostile", "pbs", "security", "live", "integration", "unit", "contract")
"""Folders of ``tests/``: those of the most waiting first."""
TOGETHER = ("globus",)
"""Folders of which one worker runs all files: they share what takes long to start."""


def folder_of(nodeid: str) -> str:
    """``slurm`` of ``tests/slurm/test_jobs.py::test_x``."""
    return nodeid.split("/")[1] if nodeid.startswith("tests/") else ""


def ordered(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """In the order of folders above, otherwise as collected."""
    places = {folder: place for place, folder in enumerate(ORDER)}
    return sorted(items, key=lambda item: places.get(folder_of(item.nodeid), len(places)))


def scheduler(config: pytest.Config, log: Any) -> Any:
    """xdist's scheduler of whole files, whose second worker takes them from the end of the list."""
    from xdist.scheduler import LoadScopeScheduling  # only where there are workers

    class FromBothEnds(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            folder = folder_of(nodeid)
            return folder if folder in TOGETHER else nodeid.split("::")[0]

        def _assign_work_unit(self, node: Any) -> None:
            if node.gateway.id == "gw1":
                self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
            super()._assign_work_unit(node)

    config.option.loadscopereorder = False  # as collected
    return FromBothEnds(config, log)
