"""Rows of tables: copied at the first write, and looked through once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from serve.core.events import Part
from serve.core.frozen import replace
from serve.core.state import Engine, EngineState, Fleet, Node, NodePhase
from serve.core.step import initial
from serve.core.table import Rows, Table, seen
from tests.support.fleets import a_policy


class Looked:
    """Finds the rows above a number, and counts how often it was asked to."""

    def __init__(self) -> None:
        self.times = 0

    def above(self, rows: Mapping[str, int], least: int) -> list[str]:
        self.times += 1
        return [name for name, row in rows.items() if row > least]


def test_the_same_rows_are_looked_through_once_for_each_question() -> None:
    looked, table = Looked(), Table(Rows.of({"a": 1, "b": 2}))
    assert [seen(table.rows, looked.above, least) for least in (0, 1, 1, 0)] == [["a", "b"], ["b"], ["b"], ["a", "b"]]
    assert looked.times == 2
    assert seen(Table(table.rows).rows, looked.above, 1) == ["b"], "a later step has the same rows"
    assert looked.times == 2


def test_rows_that_changed_are_looked_through_again() -> None:
    looked, before = Looked(), Rows.of({"a": 1, "b": 2})
    assert seen(before, looked.above, 1) == ["b"]
    table = Table(before)
    table.put("c", 3)
    assert seen(table.rows, looked.above, 1) == ["b", "c"]
    table.put("a", 4)
    assert seen(table.rows, looked.above, 1) == ["a", "b", "c"]
    table.drop("b")
    assert seen(table.rows, looked.above, 1) == ["a", "c"]
    assert seen(before, looked.above, 1) == ["b"], "those of the fleet before are as they were"
    assert looked.times == 4


def test_nothing_is_kept_of_rows_that_a_transaction_did_not_make() -> None:
    looked, rows = Looked(), {"a": 1}
    assert seen(rows, looked.above, 0) == ["a"]
    rows["b"] = 2
    assert seen(rows, looked.above, 0) == ["a", "b"]


def test_a_row_that_is_not_there_is_dropped_without_a_copy() -> None:
    rows = Rows.of({"a": 1})
    table = Table(rows)
    table.drop("b")
    assert table.rows is rows


@pytest.mark.parametrize(
    ("value", "changes"),
    [
        (Engine("e", "m", (Part("n", (0,), 5),), EngineState.READY, 0.0, 1.0), {"in_flight": 3, "up": True}),
        (Node("n", "gpu", NodePhase.UP, 0.0), {"ending": True}),
        (initial(a_policy()), {"settled": True}),
    ],
)
def test_a_quick_change_is_the_change_of_dataclasses(value: Engine | Node | Fleet, changes: dict[str, Any]) -> None:
    before = dataclasses.replace(value)
    changed = replace(value, **changes)
    assert changed == dataclasses.replace(value, **changes)
    assert type(changed) is type(value)
    assert value == before
    with pytest.raises(TypeError, match="no color"):
        replace(value, color=1)
