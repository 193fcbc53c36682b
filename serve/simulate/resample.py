"""Other days like one: variations of a trace by seed, to judge a policy on days that it was not tuned on.

(1) The day begins at another time. (2) Models that need as many GPUs exchange their requests, so that other classes are
busy. (3) Each block of 20 minutes of a model is one of its own from within an hour of it, drawn anew for each: bursts
and the shape of the day stay, who is asked together with whom does not.
"""

from __future__ import annotations

import random
from dataclasses import replace

from gateway_plugin.errors import ConfigError
from serve.simulate.traces import Request, Trace

BLOCK_S = 1200.0
BLOCKS_MIN = 24
"""Of a trace shorter than 8 hours the blocks are shorter."""
NEAR = 3
"""A block is drawn from so many before and after it."""


def resampled(trace: Trace, seed: int) -> Trace:
    """The variation ``seed`` of an open-loop trace, in memory. Raises ``ConfigError`` for one with closed loops."""
    if trace.sessions:
        raise ConfigError(f"trace '{trace.name}': a closed loop cannot be resampled; make it from another seed")
    chance = random.Random(f"resample {seed}")  # noqa: S311 - a simulation is to be repeatable
    by_model: dict[str, list[Request]] = {}
    for one in trace.arrivals:
        by_model.setdefault(one.model, []).append(one)
    last = max((found[-1].at for found in by_model.values()), default=0.0)
    block_s = min(BLOCK_S, max(last, 1.0) / BLOCKS_MIN)
    count = int(last / block_s) + 1
    turn = chance.randrange(count)
    made: list[Request] = []
    for source, model in _exchanged(trace, sorted(by_model), chance):
        blocks: list[list[Request]] = [[] for _ in range(count)]
        for one in by_model[source]:
            blocks[int(one.at / block_s)].append(one)
        for index in range(count):
            drawn = (index + turn + chance.randint(-NEAR, NEAR)) % count
            later_s = (index - drawn) * block_s
            made += (replace(one, at=max(0.0, one.at + later_s), model=model) for one in blocks[drawn])
    made.sort(key=lambda one: (one.at, one.model))
    return replace(trace, name=f"{trace.name}~{seed}", arrivals=tuple(made))


def _exchanged(trace: Trace, models: list[str], chance: random.Random) -> list[tuple[str, str]]:
    """(Whose requests, the model that gets them), each model once on either side."""
    pairs: list[tuple[str, str]] = []
    for gpus in sorted({trace.times[model].gpus for model in models}):
        alike = [model for model in models if trace.times[model].gpus == gpus]
        pairs += zip(chance.sample(alike, len(alike)), alike, strict=True)
    return pairs
