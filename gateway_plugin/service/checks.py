"""What a check before the start says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """What a check found."""

    OK = "ok"
    WARN = "warn"
    """It will run, but not as it should."""
    FAIL = "fail"
    """It cannot run."""


@dataclass(frozen=True)
class Check:
    """One check: what was looked at, what was found, and what to do if it is not well."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""
    configuration: bool = False
    """Site or catalog is wrong, not the machine."""
