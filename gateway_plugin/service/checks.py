"""The result of a check before the start."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """The result of a check."""

    OK = "ok"
    WARN = "warn"
    """It will run, with a limitation."""
    FAIL = "fail"
    """It cannot run."""


@dataclass(frozen=True)
class Check:
    """One check: what was checked, the result, and the remedy for a problem."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""
    configuration: bool = False
    """The problem is in the site or catalog, not in the machine."""
