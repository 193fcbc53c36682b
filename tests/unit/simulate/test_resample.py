"""Days like one."""

from __future__ import annotations

from collections import Counter

import pytest

from gateway_plugin.errors import ConfigError
from serve.simulate.generators import SHAPES
from serve.simulate.resample import NEAR, resampled
from serve.simulate.times import times_of
from serve.simulate.traces import Request, Trace


def test_a_seed_gives_the_same_day_again_and_another_seed_another_one() -> None:
    day = SHAPES["day-night"](1)
    one, again, other = resampled(day, 7), resampled(day, 7), resampled(day, 8)

    assert one.arrivals == again.arrivals
    assert one.arrivals != other.arrivals
    assert (one.name, one.times, one.gpus) == ("day-night~7", day.times, day.gpus)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_in_order_of_time_as_long_and_about_as_busy(seed: int) -> None:
    day = SHAPES["day-night"](1)
    before, after = tuple(day.arrivals), tuple(resampled(day, seed).arrivals)
    times = [one.at for one in after]

    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= before[-1].at + 3600
    assert 0.8 < len(after) / len(before) < 1.25


@pytest.mark.parametrize("seed", range(4))
def test_models_exchange_their_requests_with_those_of_as_many_gpus(seed: int) -> None:
    day = SHAPES["zipf-50"](1)
    length = {one.prompt_tokens: one.model for one in day.arrivals}  # of many requests this names the model
    gives: dict[str, Counter[str]] = {}
    for one in resampled(day, seed).arrivals:
        gives.setdefault(one.model, Counter())[length[one.prompt_tokens]] += 1

    assert any(found.most_common(1)[0][0] != model for model, found in gives.items())
    hot = {model: found.most_common(1)[0][0] for model, found in gives.items() if found.total() > 100}
    assert len(set(hot.values())) == len(hot)
    assert all(day.times[model].gpus == day.times[other].gpus for model, other in hot.items())


def test_a_burst_stays_one_and_near_its_time_of_the_day_but_for_the_turn() -> None:
    burst = tuple(Request(36_000 + second, "8b-1", 1, 1, "u") for second in range(60))
    day = Trace("t", times_of(("8b-1",)), (Request(0, "8b-1", 1, 1, "u"), *burst, Request(86_000, "8b-1", 1, 1, "u")))

    for seed in range(10):
        found = [one.at for one in resampled(day, seed).arrivals]
        blocks = Counter(int(at // 1200) for at in found)
        bursts = [block for block, count in blocks.items() if count >= 60]
        assert len(bursts) <= 2 * NEAR + 1
        assert all((block - bursts[0]) % 72 in (*range(7), *range(66, 72)) for block in bursts)


def test_closed_loops_and_empty_traces() -> None:
    with pytest.raises(ConfigError, match="'agents': a closed loop cannot be resampled"):
        resampled(SHAPES["agents"](1), 1)
    assert resampled(Trace("t", {}), 1).arrivals == ()
