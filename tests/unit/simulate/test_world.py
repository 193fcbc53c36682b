"""The simulated world: results known by hand, and what must hold whatever the policy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.core.step import LRU
from serve.simulate.baselines import POLICIES, Fifo
from serve.simulate.deciders import Core
from serve.simulate.generators import SHAPES
from serve.simulate.house import House
from serve.simulate.metrics import Outcome, Tally
from serve.simulate.parts import Decider, Fleet
from serve.simulate.times import Times
from serve.simulate.traces import Request, Session, Trace
from serve.simulate.world import EDGE_S, INNER_S, World

SLOW = Times(1, 70, cold_s=30, wake_s=1, prompt_tokens_per_s=1e9, token_s=1.0, beside=1e9, stop_s=2)
"""One output token takes a second, whatever runs beside it."""
ONE = Fleet(1, 1)


def asked(at: float, model: str, seconds: int, user: str = "u") -> Request:
    return Request(at, model, 0, seconds, user)


def trace_of(*arrivals: Request, sessions: tuple[Session, ...] = ()) -> Trace:
    return Trace("t", {"A": SLOW, "B": SLOW}, arrivals, sessions)


def run(trace: Trace, decider: Decider, fleet: Fleet = ONE, patience_s: float = 1800.0) -> Tally:
    return World(trace, fleet, decider, patience_s=patience_s).run()


def test_a_cold_request_waits_for_its_load_and_a_warm_one_not_at_all() -> None:
    tally = run(trace_of(asked(10, "A", 5), asked(60, "A", 5)), Core())

    cold, warm = tally.waits_s
    assert cold == pytest.approx(30 + EDGE_S + INNER_S)
    assert warm == 0
    assert tally.outcomes == {Outcome.SERVED: 2}
    assert (tally.switches, tally.loads, tally.device_s_lost) == (0, 1, 30)
    assert tally.end_s == pytest.approx(65)
    assert tally.gpu_s == tally.end_s


def test_the_gateway_leaves_a_busy_engine_alone_and_drains_an_idle_one() -> None:
    # A loads until 30, works until 130; B comes at 40: A is idle at 130, seen so at the next reading of the counters
    tally = run(trace_of(asked(0, "A", 100), asked(40, "B", 5)), Core())

    (first, second) = tally.waits_s
    idle_at = first + 100
    assert idle_at + 2 + 30 - 40 < second < idle_at + 2 + 30 - 40 + 1.5
    assert (tally.switches, tally.loads) == (1, 2)
    states = [(span.model, span.state) for span in tally.spans]
    assert states == [
        ("A", "loading"), ("A", "ready"), ("A", "draining"), ("A", "stopping"), ("B", "loading"), ("B", "ready"),
    ]  # fmt: skip


def test_a_busy_model_starves_another_under_lru_and_keeps_it_waiting_within_its_bound_under_the_gateway() -> None:
    hot = [asked(second, "A", 3) for second in range(400)]
    arrivals = sorted((*hot, asked(100.5, "B", 1, "v")), key=lambda one: one.at)

    lru, ours, fifo = (
        run(trace_of(*arrivals), Core(policies=LRU)),
        run(trace_of(*arrivals), Core()),
        run(trace_of(*arrivals), House(Fifo())),
    )

    assert max(lru.waits_s) > 300
    assert lru.switches == 1
    assert max(ours.waits_s) < 4 * 30, "four loads"
    assert ours.switches >= 2
    assert max(fifo.waits_s) < 120


def test_two_models_asked_in_turns_by_open_clients_are_served_in_batches() -> None:
    quick = replace(SLOW, cold_s=3)
    arrivals = tuple(asked(number * 0.5, "AB"[number % 2], 1) for number in range(40))

    tally = run(Trace("t", {"A": quick, "B": quick}, arrivals, ()), Core())

    assert tally.outcomes == {Outcome.SERVED: 40}
    assert tally.switches <= 3, "one by one there would be 39"
    assert tally.end_s < 35


def test_a_closed_loop_sends_a_batch_when_the_one_before_is_answered() -> None:
    batches = ((asked(0, "A", 5), asked(1, "A", 5)), (asked(0, "A", 5),))
    tally = run(trace_of(sessions=(Session(10, batches, think_s=7),)), Core())

    # loaded at 40, both served by 45, thinks until 52
    assert tally.end_s == pytest.approx(10 + 30 + 5 + 7 + 5, abs=0.1)
    assert list(tally.waits_s)[2] == 0


def test_who_waits_past_patience_is_refused_and_counted_with_that_wait() -> None:
    tally = run(trace_of(asked(0, "A", 500), asked(40, "B", 5)), Core(), patience_s=60)

    assert tally.outcomes == {Outcome.SERVED: 1, Outcome.REFUSED: 1}
    assert sorted(tally.waits_s)[1] == pytest.approx(60, abs=0.3)


def test_jain_tells_one_user_behind_anothers_backlog() -> None:
    alone = run(trace_of(asked(0, "A", 100, "u"), asked(31, "A", 10, "v")), Core())
    behind = run(trace_of(asked(0, "A", 100, "u"), asked(31, "B", 10, "v")), Core())

    assert alone.jain > 0.98  # u loads for 30 of 130 s, v not at all
    assert behind.jain < 0.75  # v waits 130 s for 10 s of work


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", ["abab-open", "class-of-30", "llmux-balanced", "agents"])
def test_every_request_has_one_outcome_and_a_run_can_be_repeated(policy: str, shape: str) -> None:
    trace = SHAPES[shape](2)
    trace = replace(trace, arrivals=tuple(trace.arrivals)[:60], sessions=trace.sessions[:4])
    fleet = Fleet(trace.gpus, trace.gpus_per_node)
    found = []
    for _ in range(2):
        decider = POLICIES[policy](trace)
        if decider is None:
            assert trace.sessions
            return
        world = World(trace, fleet, decider, patience_s=600)
        tally = world.run()
        found.append(tally.document())
    asked_for = len(tuple(trace.arrivals)) + sum(len(b) for s in trace.sessions for b in s.batches)
    assert tally.requests == len(tally.waits_s) == asked_for
    assert found[0] == found[1]
    assert tally.outcomes[Outcome.CUT] == 0, "only a drain's deadline cuts, and no request is that long"
    assert not world.pending
    given = [*trace.arrivals, *(one for session in trace.sessions for batch in session.batches for one in batch)]
    work_s = sum(trace.times[one.model].alone_s(one.prompt_tokens, one.output_tokens) for one in given)
    if tally.outcomes == {Outcome.SERVED: asked_for}:
        assert tally.work_s == pytest.approx(work_s)
    assert sum(user.work_s for user in tally.users.values()) == pytest.approx(tally.work_s)
