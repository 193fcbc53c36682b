"""A day of bursty demand and the queue's waits, both from a seed: every rule sees the same."""

from __future__ import annotations

import math
import random

from serve.core.policy import NodeTypeSpec
from serve.simulate.times import Times
from serve.simulate.traces import Request

DAY_S = 86400.0
GPU_MIB = 38 * 1024
KEEP_ALIVE_S = 600.0
"""An idle model is unloaded after this, under every rule: Ray Serve's ``downscale_delay_s``."""

NODE = NodeTypeSpec("gpu", host_mib=0, gpu_mib=(GPU_MIB,) * 4, min_nodes=0, max_nodes=8)
"""What one job gives: a node with four GPUs; eight jobs at most."""

GPUS_OF = (1, 1, 2, 1, 4, 1, 2, 1, 1, 4, 2, 1, 1, 2, 4, 1)
"""GPUs of each model, the most popular one first."""
LOAD_S = {1: 25.0, 2: 45.0, 4: 80.0}
TOKEN_S = 0.001


def times() -> dict[str, Times]:
    """The models with their times; each takes whole GPUs. A token of theirs is ``TOKEN_S`` of work."""
    return {
        f"m{index:02}": Times(
            gpus, 36.0, cold_s=LOAD_S[gpus], wake_s=0.0, prompt_tokens_per_s=math.inf, token_s=TOKEN_S, beside=math.inf,
            concurrency=100_000,
        )
        for index, gpus in enumerate(GPUS_OF)
    }  # fmt: skip


def request(at: float, model: str, work_s: float) -> Request:
    """One that comes at ``at`` and takes ``work_s`` on any engine."""
    return Request(at, model, 0, round(work_s / TOKEN_S), "")


def day(seed: int, hours: float = 24.0) -> tuple[Request, ...]:
    """Requests in order of time: people's sessions, more of them by day, and four sweeps over several models.

    A session: one model by Zipf's law, 15 minutes in the median (log-normal), a request every 10 s in the median.
    A sweep: what a workflow over many models does, 6 to 10 of them at once for 20 to 50 minutes.
    """
    chance = random.Random(f"demand {seed}")  # noqa: S311 - a simulation wants it repeatable
    names = list(times())
    popularity = [1 / (rank + 1) for rank in range(len(names))]
    found: list[Request] = []
    end = hours * 3600

    def session(start: float, model: str, lasts_s: float, rate: float) -> None:
        at = start + chance.expovariate(rate)
        while at < min(end, start + lasts_s):
            found.append(request(at, model, min(120.0, chance.lognormvariate(math.log(6.0), 0.8))))
            at += chance.expovariate(rate)

    at = 0.0
    while at < end:
        at += chance.expovariate(_sessions_per_hour(13) / 3600)
        if chance.random() * _sessions_per_hour(13) < _sessions_per_hour(at / 3600 % 24):
            lasts_s = min(7200.0, chance.lognormvariate(math.log(900), 0.8))
            session(at, chance.choices(names, popularity)[0], lasts_s, chance.lognormvariate(math.log(0.1), 0.7))
    for _ in range(4):
        start = chance.uniform(0, DAY_S)
        for model in chance.sample(names, chance.randint(6, 10)):
            session(start + chance.uniform(0, 60), model, chance.uniform(1200, 3000), 0.15)
    return tuple(sorted(found, key=lambda request: (request.at, request.model)))


def _sessions_per_hour(hour: float) -> float:
    """Between 2 at one o'clock at night and 14 at one o'clock in the afternoon."""
    return 8 - 6 * math.cos((hour - 1) / 12 * math.pi)


class Queue:
    """How long the scheduler lets a job wait: log-normal, six minutes in the median, every tenth job over 22."""

    def __init__(self, seed: int, median_s: float = 360.0, sigma: float = 1.0) -> None:
        self._seed = seed
        self._median_s, self._sigma = median_s, sigma
        self._jobs = 0

    def wait_s(self) -> float:
        """Of the next job: the n-th job of the day waits as long, whichever rule submits it."""
        self._jobs += 1
        chance = random.Random(f"queue {self._seed} {self._jobs}")  # noqa: S311
        return self._median_s * math.exp(self._sigma * chance.gauss(0, 1))
