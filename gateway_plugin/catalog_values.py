"""Values as a catalog writes them: durations, numbers, memory; and the base of those with fields. Pure."""

from __future__ import annotations

import re

from pydantic import AfterValidator, BaseModel, ConfigDict

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class Frozen(BaseModel):
    """A value with fields: one that is not known is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def matching(pattern: re.Pattern[str], expected: str) -> AfterValidator:
    """Refuses a text that does not match as a whole: ``EXPECTED, got 'TEXT'``."""

    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(f"{expected}, got {value!r}")
        return value

    return AfterValidator(check)


def parse_duration_s(value: object) -> float:
    """Seconds of ``90``, ``"90s"``, ``"10m"`` or ``"1h30m"``; ``-1`` stands for "for ever". Raises ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a duration such as 90, '10m' or -1, got {value!r}")
    if isinstance(value, int | float):
        seconds = float(value)
    else:
        text = value.strip()
        try:
            seconds = float(text)
        except ValueError:
            if not text or _DURATION.sub("", text):
                raise ValueError(f"expected a duration such as 90, '10m' or -1, got {value!r}") from None
            seconds = sum(float(n) * _UNIT_S[unit] for n, unit in _DURATION.findall(text))
    if seconds < 0 and seconds != -1:
        raise ValueError(f"a duration is 0 or more, or -1 for 'for ever', got {value!r}")
    if seconds != seconds or seconds == float("inf"):
        raise ValueError(f"a duration is a finite number of seconds, got {value!r}")
    return seconds


def number(value: object) -> object:
    """Refuse YAML's ``true``, which Python takes for 1."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value!r}")
    return value


def gib(value: object) -> object:
    """0 for ``auto`` and its like. Raises ``ValueError`` for a text with a unit, which would have to be guessed."""
    if value in (None, "auto"):
        return 0
    if isinstance(value, str) and not re.fullmatch(r"\s*[0-9.eE+-]+\s*", value):
        raise ValueError(f"expected GiB as a number, such as 24 or 2.8, or 'auto', got {value!r}")
    if isinstance(value, str | int | float) and not isinstance(value, bool) and float(value) == 0:
        raise ValueError("Input should be greater than 0")
    return number(value)
