"""The growth simulation: its books balance, a seed gives the same day again, and its rules do what their sources do."""

from __future__ import annotations

import itertools
import json
from array import array
from collections import Counter

import pytest

from benchmarks.growth import HELD_OUT, RULES, TUNED_ON, no_worse, simulate, summary
from benchmarks.growth_day import Day, Rule, nodes_needed, run_day
from benchmarks.growth_rules import OneAMinute, ParslSimple, RayDefault
from benchmarks.growth_trace import LOAD_S, NODE, Queue, day, request, times
from gateway_plugin.site import Site
from serve.core.policy import Policy
from serve.simulate.jobs import BOOT_S, LEAVE_S, Batch, Job
from serve.simulate.traces import Request

HOURS = 4.0
SEED = 3


@pytest.fixture(scope="module")
def days() -> dict[str, Day]:
    trace = day(SEED, HOURS)
    return {name: simulate(name, trace, SEED, HOURS * 3600) for name in RULES}


class FixedQueue(Queue):
    """Every job waits as long."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(0)
        self._wait_s = wait_s

    def wait_s(self) -> float:
        return self._wait_s


def run(
    *requests: Request,
    rule: Rule | None = None,
    wait_s: float = 100.0,
    end_s: float = 7200.0,
    policy: Policy | None = None,
) -> Day:
    return run_day(requests, FixedQueue(wait_s), rule, end_s, policy)


@pytest.mark.parametrize("name", RULES)
def test_every_request_is_answered_refused_or_still_waits(name: str, days: dict[str, Day]) -> None:
    made = days[name]
    assert len(made.waits_s) == len([one for one in day(SEED, HOURS) if one.at <= HOURS * 3600])
    assert len(made.waits_s) > 1000
    assert all(wait >= 0 for wait in made.waits_s)


@pytest.mark.parametrize("name", RULES)
def test_node_hours_are_the_sum_of_what_ran(name: str, days: dict[str, Day]) -> None:
    made = days[name]
    # from the other book: nodes running between changes, and the time in which a job that was given back ends
    area = 0.0
    times = [*made.nodes_over_time, (made.end_s, 0, 0)]
    for (at, running, _), (until, _, _) in itertools.pairwise(times):
        area += running * (until - at)
    ended = [job.ended for job in made.jobs.values() if job.ended is not None and job.started is not None]
    area += sum(min(LEAVE_S, max(0.0, made.end_s - (end - LEAVE_S))) for end in ended)
    assert made.node_hours == pytest.approx(area / 3600)
    assert max(running + pending for _, running, pending in made.nodes_over_time) <= NODE.max_nodes
    for job in made.jobs.values():
        assert job.started is None or job.started >= job.submitted
        assert job.started is None or job.ended is None or job.ended > job.started


def test_the_same_seed_gives_the_same_day(days: dict[str, Day]) -> None:
    again = simulate("gateway", day(SEED, HOURS), SEED, HOURS * 3600)
    assert json.dumps(again.document()) == json.dumps(days["gateway"].document())
    assert again == days["gateway"]
    assert day(SEED, HOURS) == day(SEED, HOURS)
    assert day(SEED, HOURS) != day(SEED + 1, HOURS)
    waits = [Queue(SEED).wait_s() for _ in range(3)]
    assert len(set(waits)) == 1
    assert set(days["gateway"].document()) == {
        "node_hours", "waited_over_60s", "jobs_submitted", "max_over_submission",
    }  # fmt: skip


def test_the_queue_is_log_normal() -> None:
    queue = Queue(1, median_s=300.0)
    waits = sorted(queue.wait_s() for _ in range(2001))
    assert waits[1000] == pytest.approx(300.0, rel=0.1)
    assert waits[1800] == pytest.approx(300.0 * 3.6, rel=0.15)  # the tenth longest: e to the 1.28


def test_only_what_ran_is_paid_and_only_until_the_end() -> None:
    jobs = {"a": Job(0.0, 3600.0), "b": Job(0.0, None, 50.0), "c": Job(0.0, 1000.0, 2800.0), "d": Job(7000.0)}
    assert Batch(NODE, lambda: 0.0, jobs).node_hours(7200.0) == pytest.approx(1.0 + 0.5)
    waits = array("d", [0.0, 61.0, 1800.0, 10.0])
    assert Day({}, waits, 1, 0, [], 0.0, 7200.0).waited_over_60s == 0.5


def test_the_first_request_waits_for_queue_boot_and_load() -> None:
    made = run(request(10.0, "m00", 5.0), wait_s=100.0)
    assert list(made.waits_s) == [pytest.approx(100.0 + BOOT_S + LOAD_S[1], abs=1.0)]
    assert len(made.jobs) == 1
    (job,) = made.jobs.values()
    assert job.started == pytest.approx(110.0)
    assert job.ended is not None, "the node is given back: keep-alive, then block_idle_s"
    assert made.node_hours * 3600 == pytest.approx(job.ended - 110.0)


def test_several_days_come_to_medians_and_the_largest_over_submission(days: dict[str, Day]) -> None:
    one, other, third = days["gateway"], days["up-only"], days["one-a-minute"]
    line = summary([one, other, third])
    assert line["node_hours"] == sorted(t.document()["node_hours"] for t in (one, other, third))[1]
    assert line["max_over_submission"] == third.over_submission
    assert set(line) == set(one.document())
    assert no_worse([one, one], [one, other]) == (2, 1 + (one.waited_over_60s <= other.waited_over_60s))
    assert not set(HELD_OUT) & set(TUNED_ON)


def test_what_is_simulated_is_what_a_site_gets_by_default() -> None:
    numbers = ("block_idle_s", "block_unused_s", "last_block_idle_s", "pending_idle_s")
    assert [getattr(Policy(), key) for key in numbers] == [Site.model_fields[key].default for key in numbers]


def test_packing() -> None:
    assert nodes_needed([]) == 0
    assert nodes_needed([4, 1, 1, 2]) == 2
    assert nodes_needed([2, 2, 2]) == 2
    assert max(Counter(one.gpus for one in times().values())) <= len(NODE.gpu_mib)


def test_one_a_minute_does_not_count_what_it_has_submitted() -> None:
    made = run(request(0.0, "m00", 5.0), rule=OneAMinute(), wait_s=310.0)
    assert len(made.jobs) == 6
    assert made.over_submission == 5
    assert len(run(request(0.0, "m00", 5.0), wait_s=310.0).jobs) == 1


def test_parsl_counts_pending_slots_and_ends_everything_after_two_idle_minutes() -> None:
    made = run(request(0.0, "m00", 5.0), request(1.0, "m04", 5.0), rule=ParslSimple(), wait_s=50.0)
    assert len(made.jobs) == 2
    assert made.over_submission == 0
    done = 50.0 + BOOT_S + LOAD_S[4] + 5.0
    for job in made.jobs.values():
        # and the rule's period, readings of the counters (10 s apart when nothing is in flight), drains, the job's end
        assert job.ended is not None
        assert done + 120.0 <= job.ended <= done + 160.0


def test_ray_credits_what_launches_and_launches_as_many_as_run() -> None:
    big = [request(float(index), model, 5.0) for index, model in enumerate(("m04", "m09", "m14"))]
    made = run(*big, rule=RayDefault(), wait_s=50.0, end_s=20.0)
    submitted = sorted(job.submitted for job in made.jobs.values())
    assert len(submitted) == 3
    assert all(later - earlier >= 5.0 for earlier, later in itertools.pairwise(submitted))


def test_a_pending_node_is_kept_for_a_while_when_nobody_needs_it_any_more() -> None:
    policy = Policy(node_types=(NODE,), waiting_max=100, pending_idle_s=120.0)
    made = run(request(0.0, "m00", 5.0), wait_s=10_000.0, end_s=5000.0, policy=policy)
    assert made.refused == 1
    (refused,) = made.waits_s
    (job,) = made.jobs.values()
    assert job.started is None
    assert job.ended == pytest.approx(refused + 120.0, abs=2.0)
