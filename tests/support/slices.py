"""Work in slices, done in one go."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

from serve.ingress.body import Ask, ask_in_slices

Result = TypeVar("Result")


def finished(slices: Generator[None, None, Result]) -> Result:
    """The result of ``slices``."""
    while True:
        try:
            next(slices)
        except StopIteration as done:
            result: Result = done.value
            return result


def parse_ask(body: bytes, named: str | None, form: str | None = None) -> Ask:
    """The whole of ``ask_in_slices``."""
    return finished(ask_in_slices(body, named, form))
