"""What the workers take names places that are there, and keeps together what shares a gateway."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.lanes import ORDER, TOGETHER, next_of, ordered, unit_of
from tests.support.ports import free_port

TESTS = Path(__file__).parents[1]


def test_all_places_of_the_order_and_all_shared_folders_are_there() -> None:
    assert [start for start in ORDER if not list(TESTS.glob(f"{start}*"))] == []
    assert [folder for folder in TOGETHER if not list((TESTS / folder).glob("test_*.py"))] == []


def test_a_shared_folder_is_one_unit_and_any_other_file_its_own() -> None:
    assert unit_of("tests/slurm/served/test_faults.py::test_x[a/b]") == "slurm/served/"
    assert unit_of("tests/slurm/test_jobs.py::test_x") == "tests/slurm/test_jobs.py"


def test_who_wants_the_shared_gateway_up_comes_before_who_brings_it_down() -> None:
    items: list[Any] = [
        SimpleNamespace(nodeid=f"tests/security/test_{name}.py::t") for name in ("front_door", "neighbours")
    ]
    assert [item.nodeid.split("_", 1)[1] for item in ordered(items)] == ["neighbours.py::t", "front_door.py::t"]


def test_workers_take_from_both_ends_and_the_third_small_ones_first() -> None:
    left = ["tests/slurm/test_jobs.py", "tests/unit/test_a.py", "tests/unit/test_b.py", "tests/live/test_demo.py"]
    assert [next_of(worker, left) for worker in ("gw0", "gw1", "gw2", "gw3")] == [left[0], left[3], left[1], left[3]]
    assert next_of("gw2", [left[0], left[3]]) == left[3], "Slurm is the first one's alone while there is anything else"


def test_each_worker_has_ports_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for worker in ("gw0", "gw1", "gw2"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        found.append({free_port() for _ in range(200)})
    ends = [(min(ports), max(ports)) for ports in found]
    assert all(first[1] < second[0] for first, second in pairwise(ends))
    assert ends[-1][1] < 32_768, "where the kernel's own begin"
