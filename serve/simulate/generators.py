"""Workloads of the shapes that are hard for switching, each from a seed: the same seed gives the same trace."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator, Mapping

from serve.simulate.times import Times, times_of
from serve.simulate.traces import Request, Session, Trace

DAY_S = 86400.0


def _chance(shape: str, seed: int) -> random.Random:
    return random.Random(f"{shape} {seed}")  # noqa: S311 - a simulation is to be repeatable


def _request(chance: random.Random, at: float, model: str, user: str) -> Request:
    """Lengths of typical chats: log-normal, 400 tokens in and 150 out in the median."""
    prompt = min(32_000, max(1, round(chance.lognormvariate(math.log(400), 1.0))))
    output = min(4_000, max(1, round(chance.lognormvariate(math.log(150), 0.9))))
    return Request(at, model, prompt, output, user)


def alternating(seed: int) -> Trace:
    """A B A B, closed loop: one client, 40 requests, room for one model."""
    chance = _chance("abab", seed)
    turns = tuple((_request(chance, 0.0, ("32b-a", "32b-b")[turn % 2], "u0"),) for turn in range(40))
    return Trace("abab-closed", times_of(("32b-a", "32b-b")), sessions=(Session(0.0, turns),), gpus=1, gpus_per_node=1)


def alternating_open(seed: int) -> Trace:
    """A B A B, open loop: 400 requests 5 s apart on the average, room for one model."""
    chance = _chance("abab-open", seed)
    found, at = [], 0.0
    for turn in range(400):
        at += chance.expovariate(1 / 5)
        found.append(_request(chance, at, ("32b-a", "32b-b")[turn % 2], f"u{turn % 10}"))
    return Trace("abab-open", times_of(("32b-a", "32b-b")), tuple(found), gpus=1, gpus_per_node=1)


def _poisson(
    chance: random.Random, rates: Mapping[str, float], end_s: float, users: int, shape: Callable[[float], float]
) -> Iterator[Request]:
    """Each model's requests at its rate (per second) times ``shape`` of the time (0 to 1), by thinning."""
    names = list(rates)
    total = sum(rates.values())
    weights = list(rates.values())
    at = chance.expovariate(total)
    while at < end_s:
        if chance.random() < shape(at):
            model = chance.choices(names, weights)[0]
            yield _request(chance, at, model, f"u{chance.randrange(users)}")
        at += chance.expovariate(total)


def _mixed(count: int) -> list[str]:
    """Names of ``count`` models: of ten, six of 8b, two of 32b, one each of 70b and vl."""
    kinds = ("8b", "32b", "8b", "8b", "70b", "8b", "vl", "8b", "32b", "8b")
    return [f"{kinds[index % len(kinds)]}-{index:02}" for index in range(count)]


def _zipf(names: list[str], total: float, exponent: float = 1.1) -> dict[str, float]:
    weights = [1 / (rank + 1) ** exponent for rank in range(len(names))]
    return {name: total * weight / sum(weights) for name, weight in zip(names, weights, strict=True)}


def zipf(seed: int) -> Trace:
    """Zipf's law over 50 models for two hours, on 8 GPUs."""
    chance = _chance("zipf", seed)
    names = _mixed(50)
    found = tuple(_poisson(chance, _zipf(names, 0.4), 2 * 3600, 100, lambda at: 1.0))
    return Trace("zipf-50", times_of(names), found, gpus=8)


def day_night(seed: int) -> Trace:
    """Day and night: 20 models of which half are asked by day and half by night, on 8 GPUs."""
    chance = _chance("day-night", seed)
    names = _mixed(20)

    def by_day(at: float) -> float:
        return 0.5 - 0.5 * math.cos(2 * math.pi * at / DAY_S)

    day = _poisson(chance, _zipf(names[::2], 0.15), DAY_S, 60, by_day)
    night = _poisson(_chance("night", seed), _zipf(names[1::2], 0.15), DAY_S, 60, lambda at: 1 - by_day(at))
    return Trace("day-night", times_of(names), tuple(heapq.merge(day, night, key=lambda one: one.at)), gpus=8)


def class_of_thirty(seed: int) -> Trace:
    """Thirty students begin within a minute, each on one of six models; others use six models before and beside."""
    chance = _chance("class", seed)
    names = _mixed(12)
    beside = _poisson(chance, _zipf(names[:6], 0.05), 3600, 20, lambda at: 1.0)
    other = _chance("class of thirty", seed)
    found = list(beside)
    for student in range(30):
        at = 1200 + other.uniform(0, 60)
        model = names[6 + other.randrange(6)]
        for _ in range(20):
            found.append(_request(other, at, model, f"student{student}"))
            at += other.expovariate(1 / 45)
    return Trace("class-of-30", times_of(names), tuple(sorted(found, key=lambda one: one.at)), gpus=4, gpus_per_node=4)


def hot_and_tail(seed: int) -> Trace:
    """One model that is always busy and eleven that get a request every ten minutes; room for two at a time."""
    chance = _chance("hot", seed)
    names = [f"32b-{index:02}" for index in range(12)]
    rates = {name: (1.0 if index == 0 else 1 / 600) for index, name in enumerate(names)}
    found = tuple(_poisson(chance, rates, 2 * 3600, 50, lambda at: 1.0))
    return Trace("hot-and-tail", times_of(names), found, gpus=2, gpus_per_node=2)


def agents(seed: int) -> Trace:
    """Ten workflows, closed loop: an embedder, a reranker and a generator in turn; a fourth model is used beside."""
    chance = _chance("agents", seed)
    embedder, reranker, generator, other = "8b-embed", "8b-rerank", "70b-generate", "70b-other"
    sessions = []
    for flow in range(10):
        turns = []
        for _ in range(15):
            turns += [(_request(chance, 0.0, model, f"flow{flow}"),) for model in (embedder, reranker, generator)]
        sessions.append(Session(chance.uniform(0, 300), tuple(turns), think_s=1.0))
    names = (embedder, reranker, generator, other)
    beside = tuple(_poisson(chance, {other: 1 / 200}, 3600, 5, lambda at: 1.0))
    return Trace("agents", times_of(names), beside, tuple(sessions), gpus=4, gpus_per_node=4)


def parsl_map(seed: int) -> Trace:
    """A map of 2,000 prompts over 64 workers, closed loop, beside interactive users of five other models."""
    chance = _chance("map", seed)
    names = ["32b-map", "32b-chat", "8b-chat", "8b-code", "vl-chat", "8b-tail"]
    workers = tuple(
        Session(600.0, tuple((_request(chance, 0.0, "32b-map", "map"),) for _ in range(2000 // 64 + (w < 2000 % 64))))
        for w in range(64)
    )
    users = tuple(_poisson(chance, _zipf(names[1:], 0.1), 3600, 20, lambda at: 1.0))
    return Trace("map-2000", times_of(names), users, workers, gpus=2, gpus_per_node=2)


def greedy(seed: int) -> Trace:
    """One user with 100 requests for each one of nine others, who have models of their own; room for two."""
    chance = _chance("greedy", seed)
    names = [f"32b-{index:02}" for index in range(6)]
    modest = _poisson(chance, dict.fromkeys(names[2:], 1 / 300), 3600, 9, lambda at: 1.0)
    other = _chance("the greedy one", seed)
    rate = 100 / 9 * 4 / 300  # 100 for each one of a modest user
    wanted = _poisson(other, {names[0]: rate / 2, names[1]: rate / 2}, 3600, 1, lambda at: 1.0)
    asked = (Request(one.at, one.model, one.prompt_tokens, one.output_tokens, "greedy") for one in wanted)
    found = tuple(heapq.merge(modest, asked, key=lambda one: one.at))
    return Trace("greedy-100", times_of(names), found, gpus=2, gpus_per_node=2, compare_users=True)


# --- llmux's published profiles: one GPU, two models ---
# A is at sleep level 1, which its report gives 2 s; B at level 2, 9 s once its files are in the page cache. Together
# that is what its last policy took for each of ten pairs of switches (117.9 s / 10), and a little less than the 9.2 s
# on average of its FIFO, which also waits until a model has served for 5 s. (The 3.6 s and 38.5 s of its report 1 are
# those of the first switches, files read from disk: 46 such switches would take 970 s, not the 422.6 s published.)
_TO_A = Times(1, 70, cold_s=2.3, wake_s=2.3, prompt_tokens_per_s=25_000, token_s=0.01, stop_s=0.0, weights_gib=61)
_TO_B = Times(1, 70, cold_s=9.5, wake_s=9.5, prompt_tokens_per_s=25_000, token_s=0.01, stop_s=0.0, weights_gib=61)
LLMUX_REPORT = "github.com/doublewordai/llmux, reports/switching-efficiency.md, report 4 (February 2026, one L40)"


def _llmux(name: str, arrivals: tuple[Request, ...] = (), batches: tuple[tuple[Request, ...], ...] = ()) -> Trace:
    sessions = (Session(0.0, batches),) if batches else ()
    return Trace(
        f"llmux-{name}", {"A": _TO_A, "B": _TO_B}, arrivals, sessions, gpus=1, gpus_per_node=1, source=LLMUX_REPORT
    )


def _short(at: float, model: str) -> Request:
    return Request(at, model, 50, 50, "bench")


def llmux_balanced(seed: int) -> Trace:
    """20 rounds of one request to A and, 0.1 s later, one to B; both awaited. ``seed`` changes nothing."""
    return _llmux("balanced", batches=((_short(0.0, "A"), _short(0.1, "B")),) * 20)


def llmux_bursty(seed: int) -> Trace:
    """Four bursts of ten, alternating the model, each awaited. ``seed`` changes nothing."""
    return _llmux("bursty", batches=tuple((_short(0.0, "AB"[burst % 2]),) * 10 for burst in range(4)))


def llmux_dominant(seed: int) -> Trace:
    """50 requests 0.05 s apart, every fifth for B. ``seed`` changes nothing."""
    return _llmux("dominant", tuple(_short(0.05 * index, "B" if index % 5 == 4 else "A") for index in range(50)))


def llmux_interleave(seed: int) -> Trace:
    """30 pairs of A and B at once. ``seed`` changes nothing."""
    return _llmux("interleave", tuple(_short(0.0, model) for _ in range(30) for model in "AB"))


SHAPES: Mapping[str, Callable[[int], Trace]] = {
    "abab-closed": alternating,
    "abab-open": alternating_open,
    "zipf-50": zipf,
    "day-night": day_night,
    "class-of-30": class_of_thirty,
    "hot-and-tail": hot_and_tail,
    "agents": agents,
    "map-2000": parsl_map,
    "greedy-100": greedy,
    "llmux-balanced": llmux_balanced,
    "llmux-bursty": llmux_bursty,
    "llmux-dominant": llmux_dominant,
    "llmux-interleave": llmux_interleave,
}
"""By the name of the trace that they make."""
