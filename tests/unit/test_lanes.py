"""What the two workers take names places that are there, and keeps together what shares a gateway."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.lanes import ORDER, TOGETHER, ordered, unit_of
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


def test_each_worker_has_ports_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for worker in ("gw0", "gw1"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        found.append({free_port() for _ in range(200)})
    assert max(found[0]) < min(found[1])
    assert max(found[1]) < 32_768, "where the kernel's own begin"
