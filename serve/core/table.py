"""A table of the working copy: a mapping that is copied at the first write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

Row = TypeVar("Row")


class Table(Generic[Row]):
    """A mapping that is copied at the first write."""

    __slots__ = ("_own", "rows")

    def __init__(self, rows: Mapping[str, Row]) -> None:
        self.rows: Mapping[str, Row] = rows
        self._own: dict[str, Row] | None = None

    def put(self, key: str, row: Row) -> None:
        if self._own is None:
            self.rows = self._own = dict(self.rows)
        self._own[key] = row

    def drop(self, key: str) -> None:
        """Remove ``key`` if it is there."""
        if key not in self.rows:
            return
        if self._own is None:
            self.rows = self._own = dict(self.rows)
        del self._own[key]

    def clear(self) -> None:
        self.rows = self._own = {}
