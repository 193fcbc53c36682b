"""The fewest GPUs at which 99 % of a trace's requests start within 10 s, and within 60 s.

By bisection over fleets, in steps of four GPUs. ``static`` is worked out: every model has GPUs of its own, for ever,
but for the models that together have no more than the one percent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from gateway_plugin.errors import ConfigError
from serve.simulate.baselines import POLICIES
from serve.simulate.runs import Cell, fleet_for, load
from serve.simulate.traces import Trace
from serve.simulate.world import World

LIMITS_S = (60.0, 10.0)
SHARE = 0.99
STEP = 4


@dataclass
class Needed:
    """The answer for one policy on one trace; a cell's ``gpus`` is not used."""

    cell: Cell
    gpus: dict[float, int | None] = field(default_factory=dict)
    """Limit in seconds -> GPUs; ``None``: not even with GPUs for every model."""
    tried: dict[int, dict[float, float]] = field(default_factory=dict)
    """GPUs -> limit -> share of the requests that started within it; of a run that was ended early as it could not
    reach the share, at most so many."""


class _Hopeless(Exception):
    """More requests than may have waited for longer than the limit."""


def needed(cell: Cell) -> Needed:
    """Raises ``ConfigError`` if a model of the trace fits on no node."""
    trace = load(cell.trace, cell.seed, cell.resample)
    demand = trace.demand()
    found = Needed(cell)
    if cell.policy == "static":
        alone = _rounded(_static(trace, demand))
        found.gpus = dict.fromkeys(LIMITS_S, alone)
        return found
    if POLICIES[cell.policy](trace) is None:
        raise ConfigError(
            f"trace '{trace.name}': policy '{cell.policy}' needs to know the arrivals; this one is closed"
        )
    all_of_them = _rounded(sum(trace.times[model].gpus for model in demand))
    least = _rounded(max((trace.times[model].gpus for model in demand), default=1))
    for limit_s in LIMITS_S:  # within 10 s needs no fewer than within 60 s
        low, high = least // STEP, all_of_them // STEP
        if not _reaches(found, trace, demand.total(), high * STEP, limit_s):
            found.gpus[limit_s] = None
            continue
        while low < high:
            middle = (low + high) // 2
            if _reaches(found, trace, demand.total(), middle * STEP, limit_s):
                high = middle
            else:
                low = middle + 1
        found.gpus[limit_s] = high * STEP
        least = high * STEP
    return found


def _reaches(found: Needed, trace: Trace, requests: int, gpus: int, limit_s: float) -> bool:
    shares = found.tried.setdefault(gpus, {})
    if limit_s not in shares:
        shares |= _shares(found.cell, trace, requests, gpus, limit_s)
    return shares[limit_s] >= SHARE


def _shares(cell: Cell, trace: Trace, requests: int, gpus: int, limit_s: float) -> dict[float, float]:
    """Of a run over so many GPUs, which is ended when it cannot reach the share within ``limit_s``."""
    fleet = fleet_for(trace, replace(cell, gpus=gpus))
    decider = POLICIES[cell.policy](trace)
    assert decider is not None
    spare = (1 - SHARE) * requests
    late, seen = 0, 0

    def check(now: float, came: int) -> None:
        nonlocal late, seen
        waits = world.tally.waits_s
        late += sum(waits[index] > limit_s for index in range(seen, len(waits)))
        seen = len(waits)
        if late > spare:
            raise _Hopeless

    world = World(trace, fleet, decider, patience_s=cell.patience_s, keep_spans=False, progress=check)
    try:
        waits_s = world.run().waits_s
    except _Hopeless:
        return {each: 1 - late / requests for each in LIMITS_S if each <= limit_s}
    return {each: sum(wait <= each for wait in waits_s) / max(1, requests) for each in LIMITS_S}


def _static(trace: Trace, demand: Counter[str]) -> int:
    """GPUs of every model but those whose requests together are no more than may wait; of these, those of most GPUs."""
    spare = int((1 - SHARE) * demand.total())
    fewest = {0: 0}
    """GPUs saved -> the fewest requests that go without."""
    for model, requests in demand.items():
        for saved, without in sorted(fewest.items(), reverse=True):
            both = saved + trace.times[model].gpus
            if without + requests <= spare:
                fewest[both] = min(fewest.get(both, spare), without + requests)
    return sum(trace.times[model].gpus for model in demand) - max(fewest)


def _rounded(gpus: int) -> int:
    return -(-gpus // STEP) * STEP


def show_needed(answers: Sequence[Needed], console: Console) -> None:
    """One table for all traces."""
    made = Table(title=f"Fewest GPUs for {SHARE:.0%} of the requests to start within ...", title_justify="left")
    for column in ("trace", "policy", "host GiB a node", *(f"{limit:.0f} s" for limit in sorted(LIMITS_S))):
        made.add_column(column, justify="left" if column in ("trace", "policy") else "right", no_wrap=True)
    for one in answers:
        figures = ["more" if one.gpus[limit] is None else str(one.gpus[limit]) for limit in sorted(LIMITS_S)]
        made.add_row(one.cell.label, one.cell.policy, f"{one.cell.host_gib:g}", *figures)
    console.print(made)


def needed_document(answers: Sequence[Needed]) -> list[dict[str, Any]]:
    """For the file."""
    return [
        {
            "trace": one.cell.label,
            "policy": one.cell.policy,
            "host_gib": one.cell.host_gib,
            "gpus": {f"{limit:.0f}": gpus for limit, gpus in one.gpus.items()},
            "tried": {str(gpus): _by_limit(shares) for gpus, shares in sorted(one.tried.items())},
        }
        for one in answers
    ]


def _by_limit(shares: dict[float, float]) -> dict[str, float]:
    return {f"{limit:.0f}": round(share, 5) for limit, share in shares.items()}
