"""How long a load is expected to take, by what the controller noted of earlier loads on this site. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

from gateway_plugin.sizing.estimate import Estimate

_ALIKE = 2.0
"""Models whose memory differs by no more than this factor are of one size."""


@dataclass(frozen=True)
class Load:
    """The last load of one model."""

    model: str
    source: str
    gpus: int
    mib: int
    """What its engine held then, over all of its GPUs; 0: not known."""
    seconds: float


@dataclass(frozen=True)
class Expected:
    """A load's expected duration."""

    seconds: float
    like: tuple[str, ...]
    """The models that it is known from."""
    same: bool
    """They have the same weights; else they are of about the same size."""

    @property
    def words(self) -> str:
        """``loads in about 40 s, as llama-8b did``."""
        whose = f"as {self.like[0]} did" if self.same else f"by {len(self.like)} loads of models of this size"
        return f"loads in about {self.seconds:.0f} s, {whose}"


def loads_in(cards: Mapping[str, Any]) -> tuple[Load, ...]:
    """The loads in the controller's ``cards.json``; entries that cannot be understood are left out."""
    found = []
    for name, card in cards.items():
        with suppress(AttributeError, LookupError, TypeError, ValueError):
            gpus, mib, seconds = int(card.get("gpus", 0)), int(card.get("used_mib", 0)), card.get("load_s")
            if seconds is not None:
                found.append(Load(str(name), str(card["source"]), gpus, mib * max(1, gpus), float(seconds)))
    return tuple(found)


def expected(source: str, engine: Estimate, loads: Iterable[Load]) -> Expected | None:
    """How long ``engine`` is expected to load:

    (1) as the same model did, of any revision, with or without GPUs alike; (2) as the middle one of those of about the
    same size; (3) ``None``: there were none.
    """
    alike = [load for load in loads if bool(load.gpus) == bool(engine.gpus)]
    same = [load for load in alike if load.source.partition("@")[0] == source.partition("@")[0]]
    if same:  # (1)
        last = max(same, key=lambda load: (load.gpus == engine.gpus, load.seconds, load.model))
        return Expected(last.seconds, (last.model,), same=True)
    mib = engine.total * max(1, engine.gpus) / 2**20
    near = [load for load in alike if load.mib and mib / _ALIKE <= load.mib <= mib * _ALIKE]
    if not near:  # (3)
        return None
    return Expected(
        median(load.seconds for load in near), tuple(sorted(load.model for load in near)), same=False
    )  # (2)
