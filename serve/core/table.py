"""A table of a transaction, and its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

Row = TypeVar("Row")
Found = TypeVar("Found")


class Rows(dict[str, Row]):
    """The rows of a table, not changed any more once a fleet has them, and what was found in them."""

    __slots__ = ("known",)
    known: dict[Any, Any]

    @classmethod
    def of(cls, rows: Mapping[str, Row]) -> Rows[Row]:
        """A copy, of which nothing is known yet."""
        made = cls(rows)
        made.known = {}
        return made


class Table(Generic[Row]):
    """A mapping that is copied at the first write."""

    __slots__ = ("_own", "rows")

    def __init__(self, rows: Mapping[str, Row]) -> None:
        self.rows: Mapping[str, Row] = rows
        self._own: Rows[Row] | None = None

    def put(self, key: str, row: Row) -> None:
        self.own()[key] = row

    def drop(self, key: str) -> None:
        """Remove ``key`` if it is there."""
        if key in self.rows:
            del self.own()[key]

    def own(self) -> dict[str, Row]:
        """The rows, to be changed at once."""
        if self._own is None:
            self.rows = self._own = Rows.of(self.rows)
        elif self._own.known:
            self._own.known.clear()
        return self._own


def seen(rows: Mapping[str, Row], find: Callable[..., Found], *args: Any) -> Found:
    """``find(rows, *args)``, a pure function of the rows: while they stay the same, in later steps too, it is not
    computed again. So a pass over a fleet that has not changed visits only what concerns it."""
    if type(rows) is not Rows:  # the first ones of a fleet, or read from JSON
        return find(rows, *args)
    key = (find, *args) if args else find
    if key not in rows.known:
        rows.known[key] = find(rows, *args)
    found: Found = rows.known[key]
    return found
