"""Ratios over traces, and targets met or missed, from figures known by hand."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from serve.simulate.runs import Cell, Outcomes
from serve.simulate.targets import Target, ratios, show_targets, targets, targets_document

FIGURES = {
    "switches": 5,
    "wait_mean_s": 4.0,
    "wait_p95_s": 10.0,
    "wait_p99_s": 20.0,
    "device_s_lost": 100.0,
    "jain": 0.9,
}


def outcomes(
    trace: str, policy: str, *, over_10_s: float = 0.1, past_bound: int = 0, host_gib: float = 0.0, **figures: float
) -> list[Outcomes]:
    cell = Cell(trace, policy, label=trace, host_gib=host_gib)
    return [Outcomes(cell, {**FIGURES, **figures}, over_10_s, past_bound, 0, 50, 1.0, (), (), 60.0, {"n0": 1})]


def verdicts(found: list[Target]) -> dict[str, bool]:
    return {one.what: one.met for one in found}


def test_ratios_are_ours_divided_by_theirs() -> None:
    results = {
        "zipf-50": {"gateway": outcomes("zipf-50", "gateway"), "fifo": outcomes("zipf-50", "fifo", wait_p95_s=40.0)},
        "agents": {"gateway": outcomes("agents", "gateway"), "lru": outcomes("agents", "lru", wait_p95_s=0.0)},
        "map-2000": {"fifo": outcomes("map-2000", "fifo")},
    }

    found = ratios(results)

    assert found["zipf-50"] == {"p95 / fifo": 0.25}
    assert found["agents"]["p95 / lru"] == math.inf
    assert "map-2000" not in found
    assert json.loads(json.dumps(targets_document(results), allow_nan=False))["ratios"]["agents"]["p95 / lru"] is None


@pytest.mark.parametrize(("p95", "met"), [(24.0, True), (16.0, False)])
def test_the_generated_traces_are_judged_by_their_median(p95: float, met: bool) -> None:
    theirs = {"zipf-50": 100.0, "agents": p95, "map-2000": 11.0}
    results = {
        trace: {"gateway": outcomes(trace, "gateway"), "fifo": outcomes(trace, "fifo", wait_p95_s=figure)}
        for trace, figure in theirs.items()
    }

    assert verdicts(targets(results))["median of p95 / fifo at most"] is met


def test_a_file_is_judged_against_lru_fifo_and_the_clairvoyant_one() -> None:
    results = {
        "day": {
            "gateway": outcomes("day.csv", "gateway", over_10_s=0.2),
            "lru": outcomes("day.csv", "lru", over_10_s=0.5, wait_mean_s=8.0),
            "fifo": outcomes("day.csv", "fifo", over_10_s=0.4, wait_mean_s=5.0),
            "clairvoyant": outcomes("day.csv", "clairvoyant", device_s_lost=90.0, wait_mean_s=3.0),
        }
    }

    assert verdicts(targets(results)) == {
        "waits over 10 s / lru at most": True,
        "mean / lru at most": True,
        "p99 / lru at most": True,
        "waits over 10 s / fifo at most": False,
        "mean / fifo at most": False,
        "p99 / fifo at most": True,
        "GPU-s lost / clairvoyant at most": True,
        "mean / clairvoyant at most": False,
        "requests that waited past the bound at most": True,
    }


def test_the_warm_tier_has_targets_of_its_own() -> None:
    results = {
        "day+512GiB": {"gateway": outcomes("day.csv", "gateway", host_gib=512, wait_mean_s=1.4, wait_p99_s=30)},
        "day+1024GiB": {"gateway": outcomes("day.csv", "gateway", host_gib=1024, wait_mean_s=1.6, wait_p99_s=20)},
    }

    found = [(one.trace, one.what, one.met) for one in targets(results)]
    assert found[:3] == [
        ("day+512GiB", "mean wait in seconds at most", True),
        ("day+1024GiB", "mean wait in seconds at most", False),
        ("day+1024GiB", "p99 of the waits in seconds at most", True),
    ]


def test_llmuxs_four_profiles_are_summed() -> None:
    names = [f"llmux-{name}" for name in ("balanced", "bursty", "dominant", "interleave")]
    results = {name: {"gateway": outcomes(name, "gateway", switches=7, wait_mean_s=6.2)} for name in names}

    found = verdicts(targets(results))

    assert found["switches, fewer than"] is False  # 28 are as many
    assert found["mean wait in seconds, less than"] is True


def test_jain_and_the_bound_name_the_trace() -> None:
    results = {
        "greedy-100": {"gateway": outcomes("greedy-100", "gateway", jain=0.96)},
        "zipf-50": {"gateway": outcomes("zipf-50", "gateway", past_bound=3)},
    }

    jain, bound = targets(results)
    assert (jain.trace, jain.met) == ("greedy-100", True)
    assert (bound.trace, bound.found, bound.met) == ("zipf-50", 3, False)


def test_the_tables_say_met_or_missed() -> None:
    out = io.StringIO()
    results = {"greedy-100": {"gateway": outcomes("greedy-100", "gateway"), "lru": outcomes("greedy-100", "lru")}}
    show_targets(results, Console(file=out, width=140))

    lines = out.getvalue().splitlines()
    assert any("Jain" in line and line.rstrip(" │").endswith("missed") for line in lines)
    assert any(line.startswith("│ median of 1") and "1.00" in line for line in lines)
