"""200 requests at random over two models, room for one, on whole gateways: this gateway's policies and plain least
recently used, in turn.

Every run is a gateway of its own (real edge, real Serve, fake engines with a load time), with the same requests at the
same times: an open loop, so that a policy which serves slowly is not asked less. What counts is the time from sending a
request until its answer is whole, and how often an engine was evicted for the other model.

    python -m benchmarks.switching_live [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any, Literal

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.support.gateways import ROOT, Gateway, chat_body, fake_model, gateway

OUT = ROOT / "build" / "bench"
Way = Literal["pressure", "lru"]
WAYS: tuple[Way, Way] = ("pressure", "lru")
MODELS = ("a", "b")
REQUESTS = 200
PER_S = 3.0
ANSWER_S = 1.0
LOAD_S = 3.0
PATIENCE_S = 300.0


@dataclass(frozen=True)
class Run:
    """One gateway's run over all requests."""

    way: Way
    round: int
    switches: int
    mean_s: float
    p50_s: float
    p95_s: float
    max_s: float
    failed: int
    seconds: float
    """From the first request to the last answer."""


def arrivals(seed: int) -> list[tuple[float, str]]:
    """Seconds from the start, and the model: exponential gaps, each model as likely."""
    choice = random.Random(seed)  # noqa: S311 - repeatable
    at, found = 0.0, []
    for _ in range(REQUESTS):
        at += choice.expovariate(PER_S)
        found.append((at, choice.choice(MODELS)))
    return found


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def replay(running: Gateway, requests: Sequence[tuple[float, str]]) -> tuple[list[float], int, float]:
    """Send each request at its time; the seconds that each took, how many failed, and how long all of it took."""
    took: list[float] = []
    failed = 0
    limits = httpx.Limits(max_connections=REQUESTS)
    async with running.async_client(limits=limits, timeout=PATIENCE_S) as client:
        began = time.monotonic()

        async def one(at: float, model: str) -> None:
            nonlocal failed
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            sent = time.monotonic()
            try:
                answer = await client.post("/v1/chat/completions", json=chat_body(model, f"@sleep={ANSWER_S}"))
                failed += answer.status_code != 200
            except httpx.HTTPError:
                failed += 1
            took.append(time.monotonic() - sent)

        await asyncio.gather(*(one(at, model) for at, model in requests))
        return took, failed, time.monotonic() - began


def run(way: Way, number: int, requests: Sequence[tuple[float, str]]) -> Run:
    def models(memory: Any) -> dict[str, Any]:
        return {name: fake_model(memory, "--load-delay-s", str(LOAD_S), "--tokens", "2") for name in MODELS}

    with gateway(models, switching=way) as running:
        for model in MODELS:  # how long a load takes is known from here on
            running.chat(model).raise_for_status()
        before = running.status()["switches"]
        took, failed, seconds = asyncio.run(replay(running, requests))
        switches = running.status()["switches"] - before
    return Run(
        way, number, switches, mean(took), percentile(took, 0.5), percentile(took, 0.95), max(took), failed, seconds
    )


def summary(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Way -> the median over its runs of each figure."""
    keys = ("switches", "mean_s", "p50_s", "p95_s", "max_s", "failed", "seconds")
    return {
        way: {key: round(median(getattr(one, key) for one in runs if one.way == way), 3) for key in keys}
        for way in WAYS
    }


def table(found: dict[str, dict[str, float]]) -> Table:
    made = Table(title=f"{REQUESTS} requests over two models, room for one; medians")
    for column in ("policies", "switches", "mean", "p50", "p95", "longest", "failed"):
        made.add_column(column, justify="left" if column == "policies" else "right")
    for way, row in found.items():
        waits = (f"{row[key]:.1f} s" for key in ("mean_s", "p50_s", "p95_s", "max_s"))
        made.add_row(way, f"{row['switches']:.0f}", *waits, f"{row['failed']:.0f}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="each one run of both, the order alternating")
    rounds = parser.parse_args().rounds
    runs: list[Run] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("gateways", total=2 * rounds)
        for number in range(rounds):
            for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                runs.append(run(way, number, arrivals(number)))
                progress.advance(task)
    found = summary(runs)
    OUT.mkdir(parents=True, exist_ok=True)
    load = {"requests": REQUESTS, "per_s": PER_S, "answer_s": ANSWER_S, "load_s": LOAD_S}
    document = {"load": load, "median": found, "runs": [asdict(one) for one in runs]}
    (OUT / "switching-live.json").write_text(json.dumps(document, indent=1) + "\n")
    Console().print(table(found))


if __name__ == "__main__":
    main()
