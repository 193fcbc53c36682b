"""One cell: a trace, a policy, a fleet. It may run in a process of its own: names go in, figures come out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gateway_plugin.errors import ConfigError
from serve.simulate.baselines import POLICIES
from serve.simulate.generators import SHAPES
from serve.simulate.metrics import Outcome, Span, quantile
from serve.simulate.parts import Fleet
from serve.simulate.resample import resampled
from serve.simulate.times import PIN_GIB_PER_S
from serve.simulate.traces import Trace, of_user, read_trace
from serve.simulate.world import PATIENCE_S, World


@dataclass(frozen=True)
class Cell:
    """Input of a cell."""

    trace: str
    """A name of ``SHAPES``, or a file."""
    policy: str
    seed: int = 1
    gpus: int | None = None
    """``None``: as given by the trace, and the next two with it."""
    per_node: int = 8
    gpu_gib: float = 76.0
    label: str = ""
    patience_s: float = PATIENCE_S
    keep_spans: bool = False
    host_gib: float = 0.0
    """Of each node, for engines that sleep."""
    pin_gib_per_s: float = PIN_GIB_PER_S
    resample: int | None = None
    """Not the trace itself, but this variation of it."""


@dataclass(frozen=True)
class Outcomes:
    """Result of a cell."""

    cell: Cell
    figures: Mapping[str, float | int]
    over_10_s: float
    """Share of the requests that waited longer."""
    past_bound: int
    """Requests that waited for longer than ``Times.bound_s``."""
    unserved: int
    requests: int
    took_s: float
    curve: tuple[float, ...]
    """Waits at each hundredth of the requests."""
    spans: tuple[Span, ...]
    end_s: float
    nodes: Mapping[str, int]
    """Node -> its GPUs."""


def load(name: str, seed: int, resample: int | None = None) -> Trace:
    """A generated trace, one from a file, or the variation ``resample`` of one. Raises ``ConfigError``."""
    if resample is not None:
        return resampled(load(name, seed), resample)
    if name in SHAPES:
        return SHAPES[name](seed)
    path = Path(name)
    if not path.exists():
        raise ConfigError(f"trace '{name}': neither a file nor one of {', '.join(SHAPES)}")
    return read_trace(path)


def fleet_for(trace: Trace, cell: Cell) -> Fleet:
    """Raises ``ConfigError`` if a model of the trace does not fit on any node."""
    size = (trace.gpus, trace.gpus_per_node, trace.gpu_gib)
    if cell.gpus is not None:
        size = (cell.gpus, cell.per_node, cell.gpu_gib)
    fleet = Fleet(*size, cell.host_gib, cell.pin_gib_per_s)
    largest = max(len(gpus) for gpus in fleet.nodes().values())
    for model, times in trace.times.items():
        if times.gpus > largest or times.gib > fleet.gpu_gib:
            raise ConfigError(
                f"trace '{trace.name}': model '{model}' needs {times.gpus} GPUs with {times.gib:g} GiB each; a node "
                f"has {largest} with {fleet.gpu_gib:g}. Give --gpus, --gpus-per-node or --gpu-gib."
            )
    return fleet


def run(cell: Cell, progress: Callable[[float, int], None] | None = None) -> Outcomes | None:
    """Run one cell; ``None``: there is no such policy for this trace. Raises ``ConfigError``."""
    trace = load(cell.trace, cell.seed, cell.resample)
    decider = POLICIES[cell.policy](trace)
    if decider is None:
        return None
    began = time.perf_counter()
    fleet = fleet_for(trace, cell)
    world = World(trace, fleet, decider, patience_s=cell.patience_s, keep_spans=cell.keep_spans, progress=progress)
    tally = world.run()
    figures = tally.document()
    if trace.compare_users:
        alone = {user: _alone(trace, cell, user) for user in tally.users}
        figures["jain"] = round(tally.jain_to(alone), 4)
    waits = sorted(tally.waits_s)
    return Outcomes(
        replace(cell, label=cell.label or trace.name),
        figures,
        tally.over(10.0),
        tally.past_bound,
        tally.requests - tally.outcomes[Outcome.SERVED],
        tally.requests,
        time.perf_counter() - began,
        tuple(quantile(waits, share / 100) for share in range(101)),
        tuple(tally.spans),
        tally.end_s,
        {node: len(gpus) for node, gpus in fleet.nodes().items()},
    )


def _alone(trace: Trace, cell: Cell, user: str) -> float:
    """A user's progress with the fleet to itself, under the same policy."""
    mine = of_user(trace, user)
    decider = POLICIES[cell.policy](mine)
    assert decider is not None, "a policy for the trace is one for a part of it"
    tally = World(mine, fleet_for(trace, cell), decider, patience_s=cell.patience_s, keep_spans=False).run()
    return tally.progress[user]
